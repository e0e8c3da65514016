"""Configuration files that must be refused: (name, file, content, words of the message)."""

Case = tuple[str, str, bytes, str]

_YAML: list[tuple[str, bytes, str]] = [
    ("empty", b"", "an empty file"),
    ("list", b"- a\n", "found a list"),
    ("scalar", b"words\n", "found 'words'"),
    ("deep list", b"a: " + b"[" * 5000, "c.yaml:1: not valid YAML: nested too deeply"),
    ("deep mapping", b"a: " + b"{b: " * 5000, "nested too deeply"),
    ("larger than a configuration", b"#" * 2_000_000, "larger than"),
    ("alias bomb", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"c.yaml:2: .*\*a repeats"),
    ("aliased long text", b"a: &a " + b"x" * 2000 + b"\nb: [*a, *a]\n", "write it out"),
    ("list within itself", b"seed: &a [*a]\n", r"\*a repeats"),
    ("unknown alias", b"seed: *a\n", "undefined alias"),
    ("long number", b"seed: " + b"1" * 5000, "c.yaml:1: seed: not a value"),
    ("int tag", b"seed: !!int abc\n", "seed: not a value"),
    ("float tag", b"seed: !!float abc\n", "seed: not a value"),
    ("bool tag", b"seed: !!bool abc\n", "seed: not a value"),
    ("timestamp tag", b"seed: !!timestamp abc\n", "seed: not a value"),
    ("month 13", b"seed: !!timestamp 2000-13-01\n", "seed: not a value"),
    ("binary tag", b"seed: !!binary '='\n", "c.yaml"),
    ("set tag", b"seed: !!set [a]\n", "expected a mapping"),
    ("omap tag", b"seed: !!omap 5\n", "expected a sequence"),
    ("python call", b"seed: !!python/object/apply:os.system [ls]\n", "python/object"),
    ("python name", b"seed: !!python/name:os.system x\n", "python/name"),
    ("python module", b"seed: !!python/module:os x\n", "python/module"),
    ("own tag", b"seed: !thing x\n", "!thing"),
    ("zero byte", b"seed: \x00\n", "not valid YAML"),
    ("not UTF-8", b"seed: \xff\xfe\n", "not valid YAML"),
    ("tab", b"\tseed: 1\n", "not valid YAML"),
    ("open bracket", b"seed: [1\n", "not valid YAML"),
    ("open quote", b'seed: "1\n', "not valid YAML"),
    ("two documents", b"seed: 1\n---\nseed: 2\n", "not valid YAML"),
    ("key twice", b"seed: 1\nseed: 2\n", "already given on line 1"),
    ("list as key", b"? [a]\n: 1\n", "plain names"),
    ("number as key", b"1: 2\n", "plain names"),
    ("mapping as key", b"seed: {? {a: 1} : 1}\n", "plain names"),
    ("merge key", b"<<: 5\n", "unknown key '<<'"),
    ("unknown key", b"lerning_rate: 1\n", "lerning_rate"),
]
_VALUES = {
    "seed": ("x", "[1]", "{a: 1}", "1.5"),
    "learning_rate": ("x", "-1", ".nan", ".inf", "[1]"),
    "max_steps": ("x", "1.5", "[1]", "{a: 1}"),
    "cutoff_len": ("x", "0", "-1", "1.5", "[1]"),
    "block_length": ("x", "0", "-1", "1.5"),
    "tensor_model_parallel_size": ("x", "0", "-1", "[2]"),
    "pipeline_model_parallel_size": ("x", "0", "-1", "{a: 1}"),
    "save_steps": ("x", "-1", "[1]"),
    "output_dir": ("[1]", "{a: 1}"),
    "lr_scheduler_type": ("[1]", "wrong"),
    "train_from_scratch": ("5", "[true]", "perhaps"),
}
_JSON: list[tuple[str, bytes, str]] = [
    ("JSON list", b"[1]", "expected an object"),
    ("JSON cut", b'{"seed": ', "not valid JSON"),
    ("JSON deep", b'{"seed": ' + b"[" * 200_000, "not valid JSON"),
    ("JSON long number", b'{"seed": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ("JSON not UTF-8", b"\xff", "not valid JSON"),
    ("JSON key twice", b'{"seed": 1, "seed": 2}', "given twice"),
]

CONFIGS: list[Case] = [
    *((name, "c.yaml", content, words) for name, content, words in _YAML),
    *((name, "c.json", content, words) for name, content, words in _JSON),
    *(
        (f"{key} is {value}", "c.yaml", f"{key}: {value}\n".encode(), rf"c.yaml:1: .*{key}")
        for key, values in _VALUES.items()
        for value in values
    ),
]
