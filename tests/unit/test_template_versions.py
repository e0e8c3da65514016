"""What LLaMA-Factory 0.9.6 does differently in the template, against its own recorded ids."""

import pytest
from unit.golden_sft import golden, read_case, require_qwen3, template_options

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.conversations import Conversation, Turn
from megatron_sdar.data.templates.template import (
    TemplateOptions,
    document_pieces,
    encode_conversation,
)
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

EMPTY_THINK = "<think>\n\n</think>\n\n"
CALL = '{"name": "f", "arguments": {}}'
WRITTEN_CALL = f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.fixture(scope="module")
def qwen3() -> SdarTokenizer:
    return require_qwen3()


def answers(*texts: str, role: str = "assistant", **options) -> list[tuple[str, bool]]:
    """(text, trained) of the pieces that are not a prompt, end markers left out."""
    turns = tuple(Turn("user", "q", role, text) for text in texts)
    options = {"llamafactory_version": "0.9.6", **options}
    pieces = document_pieces(Conversation(turns), TemplateOptions(**options))
    return [
        (piece.text.removesuffix("<|im_end|>\n"), piece.trained)
        for piece in pieces
        if not piece.text.startswith("<|im_start|>")
    ]


@pytest.mark.parametrize("case", golden("cases", "extra_cases"), ids=lambda case: case["name"])
def test_golden_vector(case, qwen3, tmp_path):
    options = template_options(case, llamafactory_version="0.9.6")
    ids, labels = encode_conversation(qwen3, read_case(case, tmp_path), options)
    upstream = case.get("upstream_0.9.6.dev0")
    if upstream is not None:
        assert ids.tolist() == upstream["input_ids"]
        assert labels.tolist() == upstream["labels"]
        return
    # Recorded before block padding: only the fork pads.
    same = case.get("upstream_0.9.6.dev0_same_before_block_pad")
    assert (ids.tolist() == case["input_ids"][: len(ids)]) is (same is not False)
    assert (labels.tolist() == case["labels"][: len(ids)]) is (same is not False)


@pytest.mark.parametrize("answer", ["<think>cot</think>out", "<think>", "out</think>"])
def test_a_thought_is_known_by_its_tags(answer):
    assert answers(answer) == [(answer, True)]
    assert answers(answer, llamafactory_version="0.9.4") == [(EMPTY_THINK, True), (answer, True)]


def test_only_the_templates_own_thoughts_are_removed():
    assert answers("<think>\nt\n</think>\n\na", enable_thinking=False) == [
        (EMPTY_THINK, False),
        ("a", True),
    ]
    assert answers("<think>t</think>a", enable_thinking=False) == [("<think>t</think>a", True)]


@pytest.mark.parametrize("thinking", [True, False, None])
def test_masked_turns_have_no_thought(thinking):
    found = answers(
        "<think>\nt\n</think>\n\na", "b", "c", mask_history=True, enable_thinking=thinking
    )
    assert found == [
        ("a", False),
        ("b", False),
        (EMPTY_THINK, thinking is True),
        ("c", True),
    ]


def test_the_last_thought_is_kept_with_mask_history():
    thought = "<think>\nt\n</think>\n\na"
    assert answers(thought, thought, mask_history=True) == [("a", False), (thought, True)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"<think>\nt\n</think>\n\n{CALL}", f"<think>\nt\n</think>\n\n{WRITTEN_CALL}"),
        (f"<tool_call>\n{CALL}\n</tool_call>", WRITTEN_CALL),
        (f"<think>t</think>\n<tool_call>{CALL}</tool_call>", f"<think>t</think>\n{WRITTEN_CALL}"),
    ],
)
def test_text_before_a_call_is_kept_as_it_is(content, expected):
    assert answers(content, role="function")[-1] == (expected, True)


def test_a_thought_without_the_templates_newlines_is_no_json():
    with pytest.raises(RecordError, match="bad function call: not valid JSON"):
        answers(f"<think>t</think>{CALL}", role="function")
