"""The tokenizer: special ids, declared added tokens, and refusals."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from megatron_sdar.data.demo import make_demo_data, train_tokenizer
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer

QWEN3 = Path(__file__).parents[3] / "shared" / "tokenizer" / "qwen3"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    make_demo_data(tmp_path, 200)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def qwen3() -> SdarTokenizer:
    if not QWEN3.is_dir():
        pytest.skip("the Qwen3 tokenizer is not beside the repository")
    return load_tokenizer(QWEN3)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_qwen3_gets_the_mask_token_at_the_sdar_id(qwen3):
    assert "<|MASK|>" not in (QWEN3 / "tokenizer.json").read_text()
    assert qwen3.mask_token_id == 151669
    assert (qwen3.eos_token_id, qwen3.pad_token_id) == (151645, 151643)
    assert qwen3.vocab_size == 151670
    assert qwen3.encode("a<|MASK|>b") == [64, 151669, 65]
    assert qwen3.decode([64, 151669, 65]) == "a<|MASK|>b"
    assert qwen3.decode([64, 151669, 65], skip_special=True) == "ab"


def test_directory_and_file_are_the_same_tokenizer(qwen3):
    assert load_tokenizer(QWEN3 / "tokenizer.json").fingerprint() == qwen3.fingerprint()


def test_directory_without_tokenizer_json_goes_through_transformers(qwen3, tmp_path):
    source = json.loads((QWEN3 / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(source["vocab"]))
    pairs = [m if isinstance(m, str) else " ".join(m) for m in source["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_bytes((QWEN3 / "tokenizer_config.json").read_bytes())
    loaded = load_tokenizer(tmp_path)
    text = "don't 123 <think>\n\n x\n\n\n  <|MASK|> \u00e9 \u4f60"
    assert loaded.encode(text) == qwen3.encode(text)
    assert loaded.vocab_size == qwen3.vocab_size


def test_batches_equal_single_texts(model_dir):
    tokenizer = load_tokenizer(model_dir)
    texts = ["What is 12 + 30?", "", "<|im_start|>user\n\u00e9<|MASK|>", "\n\n a"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_saved_truncation_and_padding_do_not_apply(model_dir):
    plain = load_tokenizer(model_dir).encode("What is 12 + 30?")
    backend = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(model_dir / "tokenizer.json"))
    assert len(plain) > 3
    loaded = load_tokenizer(model_dir)
    assert loaded.encode("What is 12 + 30?") == plain
    assert loaded.encode_batch(["What is 12 + 30?"]) == [plain]


def test_fingerprint_follows_the_contents(model_dir):
    before = load_tokenizer(model_dir).fingerprint()
    assert load_tokenizer(model_dir).fingerprint() == before
    (model_dir / "added_tokens.json").write_text(json.dumps({"<|extra|>": 512}))
    assert load_tokenizer(model_dir).fingerprint() != before


def test_declared_tokens_are_added_with_their_ids(model_dir):
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["512"] = {"content": "<|one|>", "special": True}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    (model_dir / "added_tokens.json").write_text(json.dumps({"<|two|>": 513}))
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.encode("<|one|><|two|>") == [512, 513]
    assert tokenizer.vocab_size == 514
    assert tokenizer.decode([512, 513], skip_special=True) == ""


def test_declared_id_that_does_not_come_true_is_refused(model_dir):
    (model_dir / "added_tokens.json").write_text(json.dumps({"<|two|>": 600}))
    with pytest.raises(ValueError, match=r"added_tokens.json: <\|two\|> .* id 600 .* it 512"):
        load_tokenizer(model_dir)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "one JSON object, got list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "must be an object of id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "whole-number id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "'content' string"),
        ("added_tokens.json", '{"<|a|>": "7"}', "whole-number id: '7'"),
        ("tokenizer.json", "not json", "not a tokenizer.json"),
    ],
)
def test_damaged_files_are_named(model_dir, file, content, message):
    (model_dir / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        load_tokenizer(model_dir)


def test_missing_markers_are_all_named():
    with pytest.raises(ValueError, match=r"here: .*<\|im_start\|>, <\|im_end\|>, <\|endoftext\|>"):
        SdarTokenizer(Tokenizer(models.BPE()), "here")
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|>;"):
        SdarTokenizer(backend, "here")


def test_paths_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="no such file or directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_tokenizer(tmp_path)


def test_slow_tokenizer_is_refused(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: object())
    with pytest.raises(ValueError, match="object has no fast tokenizer"):
        load_tokenizer(tmp_path)


def test_code_of_the_model_directory_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["custom.T", "custom.T"]}})
    )
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_mask_token_that_exists_keeps_its_id():
    tokenizer = SdarTokenizer(train_tokenizer(iter(["a b c"])), "demo")
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1
    assert tokenizer.encode("<|MASK|>") == [tokenizer.mask_token_id]


def test_token_bytes_are_those_of_the_text(model_dir):
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode("caf\u00e9 \u4f60<|im_end|>\n")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "caf\u00e9 \u4f60<|im_end|>\n"
    assert tokenizer.token_bytes(tokenizer.encode("\u00e9")[0]) == b"\xc3"
    backend = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    words = SdarTokenizer(backend, "words")
    assert words.token_bytes(words.encode("a")[0]) == b"a"
    assert words.token_bytes(10**6) == b""
