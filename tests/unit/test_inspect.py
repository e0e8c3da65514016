"""tools/inspect_data.py: what is printed is what is trained."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from unit.token_builds import build

import megatron_sdar
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.inspection import (
    ANSWER,
    PADDING,
    PROMPT,
    InspectRequest,
    ShownDocument,
    document_header,
    document_text,
    inspect_dataset,
    make_stream,
    printable,
    read_row,
)
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.grouped_stream import GroupedStream
from megatron_sdar.data.loading.loader import RowLoader, RowOptions
from megatron_sdar.data.loading.packing import pack_documents
from megatron_sdar.data.loading.row_stream import RowStream
from megatron_sdar.data.sources.datasets import Columns, DatasetSpec, Layout
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

ROOT = Path(megatron_sdar.__file__).parents[1]
CUTOFF = 256


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Token files chat and text (plain text) of one tokenizer."""
    folder = tmp_path_factory.mktemp("inspect")
    make_demo_data(folder, 120)
    (folder / "text.txt").write_text("\n".join("ab cd " * n for n in (3, 200, 40)) + "\n")
    tokenizer = load_tokenizer(folder / "model")
    chat = DatasetSpec(
        "chat", (folder / "train.jsonl",), Layout("alpaca", Columns("prompt", None, "response")), ()
    )
    text = DatasetSpec("text", (folder / "text.txt",), Layout("text", Columns("text")), ())
    build([chat], folder / "chat", tokenizer)
    build([text], folder / "text", tokenizer)
    return folder


def request(demo: Path, *names: str, **changes: object) -> InspectRequest:
    prefixes = [str(demo / name) for name in names or ("chat",)]
    return InspectRequest(prefixes, str(demo / "model"), cutoff_len=CUTOFF, **changes)


def printed(asked: InspectRequest, width: int = 10_000) -> str:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        inspect_dataset(asked, console)
    return capture.get()


def body(text: str) -> str:
    """The documents' tokens: no legend, headers, row padding or summary."""
    rows = text.split("\ntoken files")[0].split("\n")[2:]
    heads = ("document ", "row ", "<row padding")
    return "\n".join(line for line in rows if not line.startswith(heads))


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_loader_gives_the_rows_that_are_shown(demo, epoch):
    tokenizer = load_tokenizer(demo / "model")
    store = DocumentStore([TokenizedDataset(demo / "chat"), TokenizedDataset(demo / "text")])
    index = pack_documents(store.lengths, CUTOFF, 8, truncate_mode="cut")
    options = RowOptions(CUTOFF, 8, tokenizer.mask_token_id, tokenizer.pad_token_id, 1e-3, seed=7)
    loader = RowLoader(
        store, index, options, rows_per_micro_batch=1, num_micro_batches=3, dp_rank=0, dp_size=1
    )
    rows = loader.step_at(epoch * len(index))
    asked = request(demo, "chat", "text", rows=3, seed=7, epoch=epoch, block_length=8)
    text = printed(asked)
    targets = np.concatenate([row.target_ids for row in rows]).tolist()
    assert len(targets) > 100
    masked = [printable(tokenizer.token_bytes(token)) for token in targets]
    # The demo's texts hold none of the marks.
    assert re.findall(r"\[(.*?)\]", body(text)) == masked
    clean = [row.input_ids[: (row.num_tokens - row.num_padding) // 2] for row in rows]
    tokens = np.concatenate(clean).tolist()
    plain = re.sub("[][\u2502\u00ab\u00bb{}\n]", "", body(text)).replace("\u21b5", "\n")
    assert plain == tokenizer.decode(tokens)
    paddings = [f"<row padding: {row.num_padding // 2} positions>" for row in rows]
    assert re.findall(r"<row.*>", text) == [p for p in paddings if " 0 " not in p]


def test_answers_of_the_data_are_in_answer_brackets(demo):
    text = body(printed(request(demo, rows=2)))
    answers = [
        re.sub("[][\u2502\n]", "", part).replace("\u21b5", "\n")
        for part in re.findall("\u00ab(.*?)\u00bb", text, re.DOTALL)
    ]
    records = (demo / "train.jsonl").read_text()
    assert len(answers) == text.count("\u00ab") > 1
    for answer in answers:
        assert answer.startswith("<think>")
        assert answer.endswith("<|im_end|>\n")
        assert answer.removesuffix("<|im_end|>\n").replace("\n", "\\n") in records


def test_document_text_marks_kinds_masks_blocks_and_bytes(demo):
    tokenizer = load_tokenizer(demo / "model")
    ids = [
        *tokenizer.encode("\u00e9a"),
        *tokenizer.encode("\x1b\n"),
        *tokenizer.encode("<|im_end|>"),
    ]
    assert len(ids) == 6
    document = ShownDocument(
        document_id=5,
        piece=2,
        ids=np.array([*ids, tokenizer.pad_token_id, tokenizer.pad_token_id], np.int32),
        kinds=[PROMPT] * 2 + [ANSWER] * 4 + [PADDING] * 2,
        masked=np.array([0, 0, 0, 1, 1, 0, 1, 0], np.bool_),
        mask_prob=0.5005,
        num_turns=2,
        num_kept=12,
    )
    assert document_text(document, tokenizer, 4).plain == (
        "\\xc3\\xa9\u00aba[\\x1b]\u2502[\u21b5]\n<|im_end|>\u00bb{[<|endoftext|>]<|endoftext|>}"
    )
    assert document_text(document, tokenizer, 2).plain == (
        "\\xc3\\xa9\u2502\u00aba[\\x1b]\u2502[\u21b5]\n<|im_end|>\u00bb\u2502{[<|endoftext|>]"
        "<|endoftext|>}"
    )
    assert document_header(document, 0.001).plain == (
        "document 5 piece 2: 6 tokens + 2 padding, 2 turns, t 0.500 p 0.500, "
        "3 of 6 trained tokens masked; exact: 12 of 2 x 8 positions"
    )


def test_text_cannot_command_the_terminal():
    assert printable("ok \x1b]0;x\x07 \u202e \u4f60\r\t".encode()) == (
        "ok \\x1b]0;x\\x07 \\u202e \u4f60\\r\\t"
    )
    assert printable("\u4f60".encode()[:2]) == "\\xe4\\xbd"


def test_one_document_of_one_piece(demo):
    text = printed(request(demo, document=17))
    assert re.findall(r"^document (\d+)", text, re.MULTILINE) == ["17"]
    whole = printed(request(demo, rows=1000))
    header = next(line for line in whole.split("\n") if line.startswith("document 17:"))
    assert header in text
    assert "<row padding" not in text


def test_plain_text_is_split_as_in_training_and_every_piece_is_shown(demo):
    text = printed(request(demo, "text", document=1))
    heads = re.findall(r"^document 1( piece \d)?: (\d+) tokens", text, re.MULTILINE)
    tokens = TokenizedDataset(demo / "text").lengths[1]
    assert tokens > 3 * CUTOFF
    assert [piece for piece, _ in heads] == ["", " piece 1", " piece 2", " piece 3"]
    assert sum(int(count) for _, count in heads) == tokens
    assert "0 documents cut, 1 split, 0 dropped" in text
    assert "1 documents cut, 0 split" in printed(request(demo, "text", truncate_mode="cut"))


def store_of(demo: Path, name: str) -> DocumentStore:
    return DocumentStore([TokenizedDataset(demo / name)])


@pytest.mark.parametrize(
    ("name", "mode", "epoch"), [("chat", None, 3), ("text", None, 1), ("text", "cut", 0)]
)
def test_the_noise_of_every_document_is_that_of_the_row(demo, name, mode, epoch):
    stream = make_stream(request(demo, name, truncate_mode=mode), store_of(demo, name))
    num_masked = 0
    for place in range(len(stream.parts[0].index)):
        row, documents = read_row(stream, place, epoch)
        weights = row.loss_weights.tolist()
        for document in documents:
            assert document.masked.shape == document.ids.shape == (len(document.kinds),)
            count = int(document.masked.sum())
            assert weights[:count] == pytest.approx([1 / document.mask_prob] * count)
            del weights[:count]
            num_masked += count
            if name == "text":
                assert PROMPT not in document.kinds
                assert len(document.ids) <= CUTOFF
        assert not weights
    assert num_masked > 100


def test_the_positions_of_exact_are_those_that_its_rows_take(demo):
    stream = make_stream(request(demo), store_of(demo, "chat"))
    exact = GroupedStream(
        RowStream(stream.parts, replace(stream.options, semantics="exact")), repack=False
    )
    for place in range(len(stream.parts[0].index)):
        position = [stream.row_of(0, p)[1] for p in range(stream.num_rows)].index(place)
        row = exact.row_at(position)
        _, documents = read_row(stream, place, 0)
        assert sum(document.num_kept for document in documents) == row.num_tokens - row.num_padding


def test_no_more_rows_than_the_epoch_has(demo):
    text = printed(request(demo, "text", rows=1000))
    total = int(re.search(r"rows of 256 +(\d+) rows", text)[1])
    assert sorted(map(int, re.findall(r"^row (\d+) of", text, re.MULTILINE))) == [*range(total)]


def test_summary_counts_all_prefixes(demo):
    text = printed(request(demo, "chat", "text", rows=0), width=80)
    assert max(map(len, text.split("\n"))) <= 80
    assert text.count("token files") == 2
    counts = re.findall(r" ([\d,]+) \(\d+\.\d%\)$", text.split("by length")[1], re.MULTILINE)
    shown = [int(n.replace(",", "")) for n in counts]
    assert sum(shown) == 108 + 3
    assert "\nrow " not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, "--rows must be at least 0, got -1"),
        ({"epoch": -1}, "--epoch must be at least 0"),
        ({"block_length": 0}, "--block-length must be at least 1"),
        ({"cutoff_len": 0}, "--cutoff-len must be at least 1"),
        ({"noise_eps": 1.0}, "--noise-eps must be between 0 and 1, got 1.0"),
        ({"document": 108}, "--document 108: there are documents 0 to 107"),
        ({"plot": Path("lengths.txt")}, "--plot lengths.txt: no known image format"),
    ],
)
def test_mistakes(demo, changes, message):
    asked = InspectRequest(**(vars(request(demo)) | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        printed(asked)


def test_a_dropped_document_and_another_tokenizer_are_named(demo, tmp_path):
    with pytest.raises(ValueError, match=r"--document 1: it is in no row, its \d+ tokens do not"):
        printed(request(demo, "text", document=1, truncate_mode="drop"))
    make_demo_data(tmp_path, 100, seed=5)
    other = InspectRequest([str(demo / "chat")], str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"--tokenizer .*chat was made with another tokenizer"):
        printed(other)


def run_tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "inspect_data.py"), *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PATH": "", **environment},
    )


def test_the_tool(demo, tmp_path):
    image = tmp_path / "lengths.png"
    arguments = [str(demo / "chat"), "--tokenizer", str(demo / "model"), "--cutoff-len", "256"]
    done = run_tool(*arguments, "--rows", "1", "--width", "90", "--plot", str(image))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.split("\n"))) <= 90
    assert image.read_bytes().startswith(b"\x89PNG")
    assert str(image) in done.stdout.replace("\n", "")
    coloured = run_tool(*arguments, FORCE_COLOR="1").stdout
    assert "\x1b[32m" in coloured
    plain = run_tool(*arguments, "--no-color", FORCE_COLOR="1").stdout
    assert not re.search(r"\x1b\[[\d;]*(3[0-7]|4[0-7])[;m]", plain)
    failed = run_tool(str(tmp_path / "absent"), "--tokenizer", str(demo / "model"))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: ")
    assert "absent" in failed.stderr
