"""What a run tells: its log and its pictures."""
