"""The gold rule on examples counted by hand."""

from __future__ import annotations

import pytest

from align.rewards.functions import (
    FLOOR,
    brevity,
    content_stems,
    coverage,
    everyday_gold,
    repeated_part,
    stem,
    words,
)

BIRDS = "Why do birds sing?"  # content words: birds, sing


def test_words_are_lower_case_without_marks():
    assert words("**Don’t** stir; it's 2 eggs!") == ["don't", "stir", "it's", "2", "eggs"]


@pytest.mark.parametrize(
    "one, other",
    [
        ("bake", "baking"),
        ("baked", "bake"),
        ("egg", "eggs"),
        ("running", "run"),
        ("story", "stories"),
        ("thicker", "thick"),
        ("colour", "color"),
        ("apologise", "apologize"),
        ("dog's", "dog"),
    ],
)
def test_endings_and_spellings_of_one_word_share_a_stem(one, other):
    assert stem(one) == stem(other)


@pytest.mark.parametrize("one, other", [("tea", "team"), ("glass", "gas"), ("bread", "broad")])
def test_other_words_keep_other_stems(one, other):
    assert stem(one) != stem(other)


def test_content_leaves_out_function_words_and_single_letters():
    assert content_stems("How do I plan a garden, e.g. with eggs?") == {"garden", "egg"}


def test_coverage_is_the_part_of_content_words_mentioned():
    assert coverage(BIRDS, "A bird likes company.") == 0.5
    assert coverage(BIRDS, "Singing birds attract mates.") == 1.0
    assert coverage(BIRDS, "Cats sleep.") == 0.0


def test_a_prompt_without_content_words_has_no_topic_to_miss():
    assert coverage("Why is it so?", "Cats sleep.") == 1.0


@pytest.mark.parametrize("count, value", [(0, 0), (4, 0), (5, 1), (40, 1), (50, 0.75), (60, 0.5), (80, 0), (200, 0)])
def test_brevity(count, value):
    assert brevity(count) == value


def test_repeated_part_counts_trigrams_seen_before():
    # a b c, b c a, c a b, a b c: one of four came before.
    assert repeated_part(list("abcabc")) == 0.25
    assert repeated_part(list("ab")) == 0.0


def test_a_brief_answer_on_topic_gets_all():
    # 9 words; new: attract, mates, defend, home, area (5 of 5); topic 1; 1 + 1 * (1 + 1).
    answer = "Birds sing to attract mates and defend home areas."
    assert everyday_gold(BIRDS, answer, True) == 3.0


def test_a_cut_answer_lacks_exactly_the_finish():
    answer = "Birds sing to attract mates and defend home areas."
    assert everyday_gold(BIRDS, answer, False) == 2.0


def test_half_of_the_topic():
    # coverage 1/2, topic 0.5 / 0.6 = 0.8333; 1 + 1 + 0.8333.
    answer = "Birds attract mates and defend home areas."
    assert everyday_gold(BIRDS, answer, True) == 2.8333


def test_repeating_the_question_earns_only_the_finish():
    # No word beyond the question's: substance 0, so neither topic nor brevity.
    assert everyday_gold(BIRDS, "Why do birds sing?", True) == 1.0
    # 8 words, 6 trigrams, 4 distinct: minus 1/3.
    assert everyday_gold(BIRDS, "birds sing why do birds sing why do", True) == 0.6667


def test_a_keyword_said_again_and_again_is_worse_than_a_cut_answer():
    # 12 words, 10 trigrams, 1 distinct: 0.9, counted as 0.5.
    assert everyday_gold(BIRDS, "birds " * 12, True) == 0.5
    assert everyday_gold(BIRDS, "Birds sing to attract mates and defend areas.", False) > 1.0


def test_too_few_words_are_no_answer():
    # 3 words: brevity 0; new: mates (1 of 5), topic 0.8333; 1 + 0.2 * 0.8333.
    assert everyday_gold(BIRDS, "Birds want mates.", True) == 1.1667


def test_a_long_answer_loses_its_brevity():
    # 60 distinct words: brevity 0.5; 1 + 1 * (0.5 + 1).
    filler = [f"word{number}x" for number in range(58)]
    assert everyday_gold(BIRDS, " ".join(["birds", "sing", *filler]), True) == 2.5


@pytest.mark.parametrize(
    "answer, penalty",
    [
        ("Birds sing to **attract** mates and defend home areas.", 0.25),
        ("Birds sing to __attract__ mates and **defend** home areas.", 0.5),
        ("# Birds sing to attract mates and defend home areas.", 0.25),
        ("Birds sing to\n- attract mates and\n- defend home areas.", 0.5),
        ("Birds sing to\n* attract mates and defend home areas.", 0.25),
        ("Birds sing to attract mates and **defend home areas.", 0.25),
        ("Birds sing to attract mates - and * defend home areas.", 0.0),
    ],
)
def test_markup_costs_a_quarter_each(answer, penalty):
    assert everyday_gold(BIRDS, answer, True) == 3.0 - penalty


def test_more_than_two_marks_cost_no_more_than_two():
    answer = "Birds sing:\n- attract mates\n- defend home\n- mark areas"
    assert everyday_gold(BIRDS, answer, True) == 2.5


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "answer",
    ["", " \n", "**", "Cats sleep most of the day in warm places.", "Why do?"],
)
def test_empty_and_off_topic_answers_get_the_floor(answer, finished):
    assert everyday_gold(BIRDS, answer, finished) == FLOOR


def test_one_of_five_content_words_is_off_topic():
    # boil, egg, yolk, stays, soft: one is 0.2 < 0.25, two are 0.4.
    prompt = "How do I boil an egg so the yolk stays soft?"
    assert everyday_gold(prompt, "Soft music helps people relax before bedtime.", True) == FLOOR
    assert everyday_gold(prompt, "Soft eggs need six minutes in hot water.", True) > FLOOR


def test_the_worst_finished_answer_on_topic_beats_the_best_off_topic_one():
    worst = "- birds\n- birds\n- " + "birds " * 100
    assert everyday_gold(BIRDS, worst, True) == 0.0
    assert everyday_gold(BIRDS, worst, False) == -1.0 > FLOOR
    assert everyday_gold(BIRDS, worst, True) > everyday_gold(BIRDS, "A fine short answer.", True)
