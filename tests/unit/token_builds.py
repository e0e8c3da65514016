"""What the tests of builds share: demo data, a spec of the test's own, the files of a prefix."""

import json
from pathlib import Path

from megatron_sdar.data.building.build_options import BuildOptions
from megatron_sdar.data.building.builder import build_dataset, ensure_dataset
from megatron_sdar.data.building.summary import BuildSummary
from megatron_sdar.data.sources.datasets import Columns, DatasetSpec, Layout
from megatron_sdar.data.storage.metadata import metadata_path
from megatron_sdar.data.templates.template import TemplateOptions

SUFFIXES = (
    ".bin", ".idx", ".labels.bin", ".labels.idx", ".turns.bin", ".turns.idx", ".json",
)  # fmt: skip
TEMPLATE = TemplateOptions()
PAIRS = Layout("alpaca", Columns("prompt", None, "response"))


def build(specs, prefix, tokenizer, template=TEMPLATE, **options: object) -> BuildSummary:
    """build_dataset in this process unless num_workers is given, without a progress bar."""
    settings = {"num_workers": 1, "progress": False} | options
    return build_dataset(specs, prefix, tokenizer, template, BuildOptions(**settings))


def ensure(
    specs, prefix, tokenizer, template=TEMPLATE, rebuild_stale=False, **options: object
) -> BuildSummary:
    """The same for ensure_dataset."""
    settings = BuildOptions(**({"num_workers": 1, "progress": False} | options))
    return ensure_dataset(specs, prefix, tokenizer, template, settings, rebuild_stale=rebuild_stale)


def files(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def add_line(spec: DatasetSpec, record: object) -> None:
    with spec.files[0].open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def edit_metadata(prefix: Path, **changes: object) -> None:
    path = metadata_path(prefix)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
