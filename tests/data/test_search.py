"""Tree search and step pairs: a small arithmetic tree with every number by hand, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from align.data.formats import parse
from align.prepare.search import (
    Node,
    Search,
    Step,
    Tree,
    build_step_pairs,
    label_smoothing,
    read_trees,
    step_pairs,
    tree_of,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "direct_public.json").read_text())
SMOOTHING = [e for e in VECTORS if e["algorithm"] == "mcts_label_smoothing"]

PROMPT = "1+2*3="
RIGHT, WRONG, SEVEN, EIGHT, NINE = "2*3=6; ", "1+2=3; ", "1+6=7", "1+6=8", "3*3=9"
PRIORS = {
    (): {RIGHT: 0.8, WRONG: 0.2},
    (RIGHT,): {SEVEN: 0.5, EIGHT: 0.5},
    (WRONG,): {NINE: 1.0},
}
VALUES = {(RIGHT,): 0.5, (WRONG,): 0.6, (RIGHT, SEVEN): 1.0, (RIGHT, EIGHT): 0.0, (WRONG, NINE): 0.2}


def propose(_prompt, steps, count, _rng):
    found = [Step(text, math.log(p), 1, bool(steps)) for text, p in PRIORS[steps].items()]
    return (found * count)[:count]  # the same step again where there are not enough: must be one child


def value(_prompt, steps, _done):
    return VALUES[steps]


def search(**changes) -> Search:
    settings = {"actions": 2, "root_actions": 2, "iterations": 1, "root_iterations": 3, "depth": 2, "max_steps": 4,
                "exploration": 1.0, "length_power": 1.25, "gamma": 1.0}  # fmt: skip
    return Search(**(settings | changes))


def numbers(node: Node) -> list[float]:
    return [node.q, node.v, node.visits, node.value, node.prior]


def test_one_iteration_by_hand():
    """No visits, so no bonus: Q is the value, and 1+2=3 (0.6) is ahead of 2*3=6 (0.5).

    Below it stands 3*3=9 with Q = 0.2 - 0.6 = -0.4. Backed up: V = -0.4, Q = 0.6 - 0.4 = 0.2, and at the root
    V = (0.5 + 0.2) / 2 where the step without a visit counts once.
    """
    tree = search(root_iterations=1, max_steps=1, depth=1)(PROMPT, propose, value, 0)
    right, wrong = tree.root.children
    assert numbers(right) == pytest.approx([0.5, 0, 0, 0.5, 0.8])
    assert numbers(wrong) == pytest.approx([0.6, 0, 1, 0.6, 0.2])
    tree = search(root_iterations=1)(PROMPT, propose, value, 0)
    right, wrong = tree.root.children
    assert numbers(wrong) == pytest.approx([0.2, -0.4, 1, 0.6, 0.2])
    assert numbers(wrong.children[0]) == pytest.approx([-0.4, 0, 2, 0.2, 1.0])  # visited again by the second decision
    assert len(wrong.children) == 1


def test_three_iterations_by_hand():
    """Iteration 2: root N = 1: 0.5 + 0.8 * 1 / 1 = 1.3 against 0.2 + 0.2 * 1 / 2 = 0.3; then 1+6=7 (Q 0.5) before
    1+6=8 (Q -0.5); V = 0, Q = 0.5.
    Iteration 3: root N = 2: 0.5 + 0.8 * 1.414 / 2 = 1.066 against 0.2 + 0.2 * 1.414 / 2 = 0.341; below, 0.5 + 0.5 / 2
    against -0.5 + 0.5: 1+6=7 again; V = (2 * 0.5 - 0.5) / 3 = 1/6, Q = 2/3, N = 2; root
    V = (2 * 2/3 + 0.2) / 3 = 0.5111. Decision: 2*3=6. The fourth iteration starts there and leaves its numbers, as
    decided on, alone.
    """
    tree = search()(PROMPT, propose, value, 0)
    right, wrong = tree.root.children
    assert numbers(right) == pytest.approx([2 / 3, 1 / 6, 2, 0.5, 0.8])
    assert numbers(wrong) == pytest.approx([0.2, -0.4, 1, 0.6, 0.2])
    assert numbers(tree.root)[:3] == pytest.approx([0.5111111, 0.5111111, 3])
    seven, eight = right.children
    assert numbers(seven) == pytest.approx([0.5, 0, 3, 1.0, 0.5])
    assert numbers(eight) == pytest.approx([-0.5, 0, 0, 0.0, 0.5])


def test_gamma_and_exploration_by_hand():
    """gamma 0.5: Q = 0.6 + 0.5 * -0.4 = 0.4 after one iteration. Without exploration 0.5 > 0.4 is chosen next."""
    tree = search(root_iterations=1, gamma=0.5)(PROMPT, propose, value, 0)
    assert tree.root.children[1].q == pytest.approx(0.4)
    tree = search(root_iterations=2, exploration=0.0)(PROMPT, propose, value, 0)
    assert [child.visits for child in tree.root.children] == [1, 1]


@pytest.mark.parametrize("iterations, visits", [(5, [5, 0]), (6, [5, 1])])
def test_bonus_grows_with_the_root_of_the_visits(iterations, visits):
    """Answers of value 0.5 and 0.3, priors 0.1 and 0.11, so Q stays. With N visits of the root, all of the first:

    N = 4: 0.5 + 0.1 * 2 / 5 = 0.540 against 0.3 + 0.11 * 2 = 0.520;
    N = 5: 0.5 + 0.1 * 2.236 / 6 = 0.537 against 0.3 + 0.11 * 2.236 = 0.546.
    """
    steps = [Step("a", math.log(0.1), 1, True), Step("b", math.log(0.11), 1, True)]
    worth = {"a": 0.5, "b": 0.3}
    tree = search(root_iterations=iterations)("Q", lambda *_: steps, lambda _p, s, _d: worth[s[0]], 0)
    assert [child.visits for child in tree.root.children] == visits


def test_of_equal_steps_the_first_counts():
    steps = [Step("a", -1.0, 1, True), Step("a", -2.0, 1, True)]
    (child,) = search()("Q", lambda *_: steps, lambda *_: 0.0, 0).root.children
    assert child.prior == pytest.approx(math.exp(-1))


def test_prior_is_the_length_normalised_probability():
    """exp(-4 / 4 ** 1.25) = exp(-0.7071); with power 1 the mean, exp(-1)."""
    step = Step("x", -4.0, 4, False)
    assert search().prior(step) == pytest.approx(math.exp(-0.70710678))
    assert search(length_power=1.0).prior(step) == pytest.approx(math.exp(-1))


def test_step_pairs_by_hand():
    """First step: 2*3=6 (Q 2/3, N 2) over 1+2=3 (Q 0.2, N 1) and its only continuation. Smoothing: 1 - 1/(1 + 1/2).

    Second: 1+6=7 over 1+6=8, never visited: smoothing 0.
    """
    rows, skipped = step_pairs(search()(PROMPT, propose, value, 0))
    assert skipped == {}
    assert [(r["chosen"], r["rejected"]) for r in rows] == [
        (RIGHT, WRONG + NINE), (RIGHT + SEVEN, RIGHT + EIGHT)
    ]  # fmt: skip
    assert [(r["chosen_finished"], r["rejected_finished"]) for r in rows] == [(False, True), (True, True)]
    assert [r["numbers"]["label_smoothing"] for r in rows] == pytest.approx([1 / 3, 0])
    assert [r["prompt"] for r in rows] == [PROMPT, PROMPT]
    for row in rows:
        assert parse(row).numbers == row["numbers"]
        assert parse(row).sides["chosen"].finished == row["chosen_finished"]


@pytest.mark.parametrize("entry", SMOOTHING, ids=lambda e: e["name"])
def test_label_smoothing_vector(entry):
    found = label_smoothing(entry["inputs"]["visits_better"], entry["inputs"]["visits_worse"])
    assert found == pytest.approx(entry["expected"]["label_smoothing"], rel=1e-9)


def test_five_vectors_were_found():
    assert len(SMOOTHING) == 5


def leaf(text: str, q: float, visits: int, value: float = 0.0) -> Node:
    return Node(text, q, visits, value, done=True)


@pytest.mark.parametrize(
    "children, better, worse",
    [
        ([leaf("a", 0.1, 1), leaf("b", 0.3, 9), leaf("c", 0.2, 1)], "b", "a"),
        ([leaf("a", 0.3, 1), leaf("b", 0.1, 9), leaf("c", 0.2, 1)], "a", "b"),  # Q counts, visits do not
        ([leaf("a", 0.2, 1, 9.0), leaf("b", 0.2, 3, 0.0), leaf("c", 0.2, 1, 5.0)], "b", "c"),  # then the most visited
        ([leaf("a", 0.2, 2, 5.0), leaf("b", 0.2, 2, 9.0)], "b", "a"),  # then the value
        ([leaf("a", 0.2, 1), leaf("b", 0.2, 4), leaf("c", 0.2, 0)], "b", "c"),  # then the visits
    ],
)
def test_order_of_children(children, better, worse):
    rows, _ = step_pairs(Tree("Q", Node("", 0.0, 0, children=tuple(children))))
    assert [(r["chosen"], r["rejected"]) for r in rows] == [(better, worse)]


def test_steps_without_a_pair_are_counted():
    """Equal in everything: no preference. Equal with its continuation: nothing differs. An only child: no choice."""
    split = Node("ab", 0.5, 2, children=(leaf("c", 0.1, 1), leaf("d", 0.1, 1)))
    tree = Tree("Q", Node("", 0.0, 0, children=(Node("x", 0.0, 3, children=(split,)),)))
    assert step_pairs(tree) == ([], {"equal_score": 1})
    forced = Node("a", 0.7, 3, children=(leaf("bc", 0.0, 1),))
    tree = Tree("Q", Node("", 0.0, 0, children=(forced, leaf("abc", 0.1, 1))))
    assert step_pairs(tree) == ([], {"identical": 1})


def test_path_so_far_stands_before_both():
    deep = Node("ab", 0.5, 2, children=(leaf("c", 0.1, 1), leaf("d", 0.2, 2)))
    tree = Tree([{"role": "user", "content": "Q"}], Node("", 0.0, 0, children=(Node("x", 0.0, 3, children=(deep,)),)))
    (row,), _ = step_pairs(tree)
    assert (row["chosen"], row["rejected"]) == ("xabd", "xabc")
    assert parse(row).sides["chosen"].completion == ({"role": "assistant", "content": "xabd"},)


def test_search_follows_the_most_visited_child_not_the_best():
    children = (Node("a", 0.9, 1, children=(leaf("x", 1, 1), leaf("y", 0, 1))),
                Node("b", 0.1, 5, children=(leaf("z", 1, 1), leaf("w", 0, 1))))  # fmt: skip
    rows, _ = step_pairs(Tree("Q", Node("", 0.0, 0, children=children)))
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("a", "b"), ("bz", "bw")]


TARGET = "4096"


def propose_digits(_prompt, steps, count, rng):
    digits = rng.integers(0, 10, count)
    return [Step(str(d), math.log(0.1), 1, len(steps) + 1 == len(TARGET)) for d in digits]


def correct_digits(_prompt, steps, _done):
    return sum(a == b for a, b in zip(steps, TARGET, strict=False)) / len(TARGET)


def test_sampled_search_is_deterministic_bounded_and_prefers_right_digits():
    """Random digits, valued by how many are right so far: no step pair may prefer a wrong digit to a right one."""
    settings = search(actions=6, root_actions=6, iterations=20, root_iterations=40, depth=4)
    first, again, other = (settings("2**12=", propose_digits, correct_digits, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    compared = 0
    for seed in range(5):
        for row in step_pairs(settings("2**12=", propose_digits, correct_digits, seed))[0]:
            place = next(i for i, (a, b) in enumerate(zip(row["chosen"], row["rejected"], strict=False)) if a != b)
            assert row["rejected"][place] != TARGET[place]
            compared += row["chosen"][place] == TARGET[place]
            assert 0 <= row["numbers"]["label_smoothing"] <= 0.5
    assert compared >= 5
    assert (
        deepest(settings("", lambda *a: [Step("x", 0.0, 1, False), Step("y", 0.0, 1, False)], lambda *_: 0.0, 0).root)
        == 4
    )


def deepest(node: Node) -> int:
    return max((1 + deepest(child) for child in node.children), default=0)


def test_a_policy_that_proposes_nothing_ends_the_search():
    assert search()("Q", lambda *_: [], value, 0).root.children == ()


@pytest.mark.parametrize(
    "step, worth, text",
    [
        (Step("x", 0.1, 1, True), 0.0, "logp 0.1"),
        (Step("x", float("nan"), 1, True), 0.0, "logp nan"),
        (Step("x", -1.0, 0, True), 0.0, "has 0 tokens"),
        (Step("x", -1.0, 1, True), float("nan"), "value of step 'x' is nan"),
    ],
)
def test_what_a_sampler_may_not_say(step, worth, text):
    with pytest.raises(ValueError, match=text):
        search()("Q", lambda *_: [step], lambda *_: worth, 0)


@pytest.mark.parametrize("change", [{"depth": 0}, {"iterations": 0}, {"gamma": 0.0}, {"exploration": -1.0}])
def test_impossible_setting(change):
    with pytest.raises(ValueError, match=f"search.{next(iter(change))}="):
        search(**change)


# ---------------------------------------------------------------------- files


def test_tree_through_a_file(tmp_path):
    tree = search()(PROMPT, propose, value, 0)
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(tree.as_dict()) + "\n" + json.dumps(tree.as_dict()))
    assert [(where, t) for where, t in read_trees([str(path)])] == [(f"{path}:1", tree), (f"{path}:2", tree)]
    account = build_step_pairs([str(path)], tmp_path / "pairs.jsonl")
    assert (account["trees_in"], account["pairs_out"], account["steps_skipped"]) == (2, 4, {})
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert rows == step_pairs(tree)[0] * 2
    assert json.loads((tmp_path / "pairs.account").read_text()) == account


def test_smallest_tree_that_somebody_else_wrote():
    tree = tree_of({"prompt": "Q", "root": {"children": [
        {"text": "a", "Q": 1, "visits": 3}, {"text": "b", "Q": 0, "visits": 1}]}})  # fmt: skip
    assert [(r["chosen"], r["rejected"]) for r in step_pairs(tree)[0]] == [("a", "b")]


@pytest.mark.parametrize(
    "record, text",
    [
        ({"root": {}}, "prompt must be a text"),
        ({"prompt": "Q"}, "root must be a node"),
        ({"prompt": "Q", "root": {"children": [{"text": "a", "visits": 1}]}}, "root.children[0].Q is missing"),
        ({"prompt": "Q", "root": {"children": [{"text": "a", "Q": "1", "visits": 1}]}}, "root.children[0].Q must be a"),
        (
            {"prompt": "Q", "root": {"children": [{"text": "a", "Q": 1, "visits": -1}]}},
            "visits must be an integer from",
        ),
        ({"prompt": "Q", "root": {"children": [{"text": "a", "Q": 1, "visits": 1, "value": None}]}}, "value must be a"),
        ({"prompt": "Q", "root": {"children": {"text": "a"}}}, "children a list"),
        ({"prompt": "Q", "root": {"children": ["a"]}}, "root.children[0] must be an object"),
    ],
)
def test_tree_refused_with_file_and_line(tmp_path, record, text):
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        list(read_trees([str(path)]))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert text in str(caught.value)


def test_no_step_pair_is_an_error(tmp_path):
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "root": {"children": []}}))
    with pytest.raises(ValueError, match="no step pair from 1 trees"):
        build_step_pairs([str(path)], tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_search_asks_for_what_it_was_told_to():
    counts = []

    def asked(_prompt, steps, count, rng):
        counts.append((len(steps), count))
        return propose_digits(_prompt, steps, count, rng)

    search(root_actions=5, actions=3)("Q", asked, correct_digits, 0)
    assert {count for depth, count in counts if depth == 0} == {5}
    assert {count for depth, count in counts if depth} == {3}
