"""The data path measured: build against a bare tokenizer, memory, fill, rows, waiting.

Every figure is a ratio, a share or a count, taken in one run on one machine; the two sides of a
ratio run in turn. The trainer and the builds whose memory is measured are processes of their own,
as a user starts them.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_sdar.data.building.build_options import BuildOptions
from megatron_sdar.data.building.builder import build_dataset
from megatron_sdar.data.building.part import part_pieces
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.packing import pack_documents
from megatron_sdar.data.loading.row_options import RowOptions
from megatron_sdar.data.loading.row_stream import RowPart, RowStream
from megatron_sdar.data.readers.spans import read_file
from megatron_sdar.data.sources.datasets import dataset_from_file
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer

_ROOT = Path(__file__).resolve().parents[2]
_CAPACITIES = (1024, 2048, 4096, 20480)
_TIMED_BYTES = 80_000_000
_RAW_BATCH = 3000
_ROW_SECONDS = 3.0


@dataclass(frozen=True)
class DataFigures:
    """What `measure_data` finds.

    Attributes:
        tokenize_vs_raw: tokens per second of a whole build (read, template, tokenise, write, on
            all cores, start of its processes included) over those of a bare
            `tokenizers.encode_batch` of the same strings; median of the rounds.
        peak_rss_mb: largest resident memory of all processes of a build of the large input.
        peak_rss_small_mb: the same for the input as it is.
        fill_*: occupied share of rows of that many tokens, block_length 4.
        extra_rows_*: rows beyond the number below which no packing can come.
        row_tokens_per_s: positions of rows (noisy and clean) made per second on one core.
        loader_wait_share: share of the trainer's time in which it waited for rows.
    """

    tokenize_vs_raw: float
    peak_rss_mb: float
    peak_rss_small_mb: float
    fill_1024: float
    fill_2048: float
    fill_4096: float
    fill_20480: float
    extra_rows_1024: int
    extra_rows_2048: int
    extra_rows_4096: int
    extra_rows_20480: int
    row_tokens_per_s: float
    loader_wait_share: float


def measure_data(
    input_file: Path, tokenizer_path: Path, *, rounds: int, repeat: int, say: Callable[[str], None]
) -> DataFigures:
    """Measure the data path on INPUT_FILE (.jsonl) with the tokenizer at TOKENIZER_PATH.

    Args:
        rounds: how often build and bare tokenizer run in turn.
        repeat: the large input is the file this many times over.
        say: called with what is being measured.
    """
    with tempfile.TemporaryDirectory(prefix="sdar-benchmark-") as name:
        work = Path(name)
        large = _repeated(input_file, work / "large.jsonl", repeat)
        size = input_file.stat().st_size
        times = min(max(1, -(-_TIMED_BYTES // size)), repeat)
        timed = _repeated(input_file, work / "timed.jsonl", times)
        say(f"tokenising {times}x the input, {rounds} rounds in turn with bare tokenizers")
        ratio = _tokenize_ratio(timed, tokenizer_path, work, rounds, say)
        say(f"memory of a build of 1x and {repeat}x the input")
        small_mb = _build_memory(input_file, tokenizer_path, work / "small")
        large_mb = _build_memory(large, tokenizer_path, work / "large")
        dataset = TokenizedDataset(work / "small")
        fills, extra = _pack_figures(dataset)
        say("making rows on one core")
        speed = _row_speed(dataset)
        say("training a small model to see how long it waits for rows")
        wait = _wait_share(work / "small", tokenizer_path, work)
    return DataFigures(
        tokenize_vs_raw=ratio,
        peak_rss_mb=large_mb,
        peak_rss_small_mb=small_mb,
        fill_1024=fills[1024],
        fill_2048=fills[2048],
        fill_4096=fills[4096],
        fill_20480=fills[20480],
        extra_rows_1024=extra[1024],
        extra_rows_2048=extra[2048],
        extra_rows_4096=extra[4096],
        extra_rows_20480=extra[20480],
        row_tokens_per_s=speed,
        loader_wait_share=wait,
    )


def show_figures(figures: DataFigures) -> None:
    """Print the figures beside the goals that the project has set itself."""
    goals = {
        "tokenize_vs_raw": ">= 1.5",
        "peak_rss_mb": "< 600",
        "fill_1024": ">= 0.995",
        "fill_2048": ">= 0.998",
        "fill_4096": ">= 0.998",
        "fill_20480": ">= 0.999, or the fewest rows possible",
        "row_tokens_per_s": ">= 3,000,000",
        "loader_wait_share": "< 0.02",
    }
    table = Table("figure", "measured", "goal (GSM8K, Qwen3's tokenizer, 2 cores)")
    for name, value in asdict(figures).items():
        table.add_row(name, _shown(value), goals.get(name, ""))
    Console(soft_wrap=True).print(table)


def _shown(value: float) -> str:
    return f"{value:,.4f}" if isinstance(value, float) and value < 10 else f"{value:,.0f}"


def _repeated(source: Path, target: Path, times: int) -> Path:
    content = source.read_bytes()
    if not content.endswith(b"\n"):
        content += b"\n"
    with target.open("wb") as stream:
        for _ in range(times):
            stream.write(content)
    return target


def _tokenize_ratio(
    file: Path, tokenizer_path: Path, work: Path, rounds: int, say: Callable[[str], None]
) -> float:
    spec = dataset_from_file(file)
    template = TemplateOptions()
    texts = [
        piece.text for record in read_file(file) for piece in part_pieces(spec, record, template)
    ]
    tokenizer = load_tokenizer(tokenizer_path)
    ratios = []
    for _ in range(rounds):
        raw_tokens, raw_seconds = _encode_bare(tokenizer, texts)
        started = time.perf_counter()
        summary = build_dataset(
            [spec], work / "timed", load_tokenizer(tokenizer_path), template,
            BuildOptions(overwrite=True, progress=False),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        if summary.num_tokens != raw_tokens:
            raise ValueError(
                f"the build gave {summary.num_tokens} tokens, tokenizers {raw_tokens}; this is a "
                "defect of the fast tokenizer: please report it"
            )
        ratios.append(summary.num_tokens / seconds / (raw_tokens / raw_seconds))
        say(
            f"  build {summary.num_tokens / seconds:,.0f} tokens/s, "
            f"bare {raw_tokens / raw_seconds:,.0f} tokens/s, ratio {ratios[-1]:.2f}"
        )
    return median(ratios)


def _encode_bare(tokenizer: SdarTokenizer, texts: list[str]) -> tuple[int, float]:
    """(tokens, seconds) of the tokenizers library alone, on all cores."""
    started = time.perf_counter()
    num_tokens = 0
    for first in range(0, len(texts), _RAW_BATCH):
        batch = texts[first : first + _RAW_BATCH]
        encodings = tokenizer.backend.encode_batch(batch, add_special_tokens=False)
        num_tokens += sum(len(encoding) for encoding in encodings)
    return num_tokens, time.perf_counter() - started


def _build_memory(file: Path, tokenizer_path: Path, prefix: Path) -> float:
    """Peak resident MiB of `tools/preprocess_data.py` on FILE, all its processes together."""
    command = [
        sys.executable, str(_ROOT / "tools" / "preprocess_data.py"), "--input", str(file),
        "--tokenizer", str(tokenizer_path), "--output-prefix", str(prefix),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, _tree_rss(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    stop.set()
    watcher.join()
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed: {errors.strip()}")
    return peak / 2**20


def _tree_rss(pid: int) -> int:
    """Resident bytes of a process and all below it (Linux); 0 once it has gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    return own + sum(_tree_rss(int(child)) for child in children)


def _pack_figures(dataset: TokenizedDataset) -> tuple[dict[int, float], dict[int, int]]:
    """(fill, rows beyond the lower bound) by row length."""
    fills, extra = {}, {}
    for capacity in _CAPACITIES:
        packed = pack_documents(dataset.lengths, capacity, 4, truncate_mode="cut")
        fills[capacity] = packed.fill
        # fill * rows is the number of rows that the occupied positions alone would take.
        extra[capacity] = len(packed) - math.ceil(packed.fill * len(packed) - 1e-6)
    return fills, extra


def _row_speed(dataset: TokenizedDataset) -> float:
    """Positions per second of one thread making rows of 2 x 2048."""
    cutoff = 2048
    store = DocumentStore([dataset])
    index = pack_documents(dataset.lengths, cutoff, 4, truncate_mode="cut")
    metadata = dataset.metadata
    options = RowOptions(cutoff, 4, metadata.mask_token_id, metadata.pad_token_id, 1e-3, 42)
    stream = RowStream([RowPart(store, index)], options)
    stream.row_at(0)
    made = 0
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < _ROW_SECONDS:
        stream.row_at(made)
        made += 1
    return made * 2 * cutoff / seconds


def _wait_share(prefix: Path, tokenizer_path: Path, work: Path) -> float:
    """Share of its time that pretrain_sdar.py waits for rows, after its first step."""
    output, model = work / "run", work / "model"
    shutil.copytree(_ROOT / "configs" / "models" / "gsm8k_tiny", model)
    metadata = TokenizedDataset(prefix).metadata
    architecture = json.loads((model / "config.json").read_text(encoding="utf-8"))
    architecture |= {
        "vocab_size": metadata.vocab_size,
        "mask_token_id": metadata.mask_token_id,
    }
    (model / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
    config = work / "run.yaml"
    config.write_text(
        f"model_name_or_path: {model}\ntokenizer_name_or_path: {tokenizer_path}\n"
        f"train_from_scratch: true\ndata_path: {prefix}\ncutoff_len: 2048\nblock_length: 4\n"
        "per_device_train_batch_size: 1\nmax_steps: 6\nlogging_steps: 1\nsave_strategy: 'no'\n"
        f"export_hf: false\nsave_only_model: true\ndevice: cpu\noutput_dir: {output}\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(_ROOT / "pretrain_sdar.py"), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    lines = (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    shares = [json.loads(line)["data_wait_share"] for line in lines[1:]]
    return float(np.mean(shares))
