"""Files with bytes changed, cut or made up: read in full, or refused with a sentence."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from fastlora import reference, tuning
from fastlora.backends.machine import cpu
from fastlora.cli.errors import CliError
from fastlora.cli.finetune.examples import IGNORED, tokens_of
from fastlora.cli.finetune.read import Record, read
from fastlora.integrations.peft.loading import CONFIG, load_adapter
from fastlora.integrations.transformers import convert_gguf
from fastlora.integrations.transformers.loading import load_model
from fastlora.quant import QuantState
from tests.fuzz.budget import budget
from tests.tiny import save_model, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore")
RECORDS = (
    b'{"text": "a b"}\n{"prompt": "a", "completion": "b"}\n',
    b'[{"messages": [{"role": "user", "content": "a"}]}]',
    b'prompt,completion\n"a, b",c\n',
    b"prompt\tcompletion\na\tb\n",
    b"Some text, of two lines.\n{ braces }\n",
    b"\x1f\x8b\x08\x00",
    b"PAR1....PAR1",
    b"ARROW1..",
)
NAMES = st.sampled_from(["a", "a.txt", "a.json", "a.jsonl", "a.csv", "a.tsv", "a.gz", "a.parquet"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes replaced, put in, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                del data[place:]
            case 1:
                data[place:place] = draw(st.binary(max_size=6))
            case 2:
                data[place : place + 1] = draw(
                    st.sampled_from([b"{", b"[", b'"', b",", b"\n", b"\\"])
                )
            case _:
                del data[place : place + draw(st.integers(1, 8))]
    return bytes(data)


@given(data=st.data(), name=NAMES)
@budget(in_ci=300)
def test_data_files(data: st.DataObject, name: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data.draw(st.sampled_from(RECORDS).flatmap(changed) | st.binary(max_size=40)))
    try:
        content = read(str(path))
    except CliError as error:
        assert str(error).startswith("--data: ")
        return
    assert content


# ---- records ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


TEXT = st.sampled_from(["", " ", "the cat", " sat on", "<|end|>", "<eos>", "{{ 1 }}", "\x00", "é"])
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "", "a b"])
CALL = {"type": "function", "function": {"name": "dog", "arguments": {}}}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES | JSON, "content": TEXT | JSON},
        optional={"tool_calls": st.just([CALL]) | JSON, "name": JSON},
    )
    | JSON,
    max_size=5,
)
FIELDS = {"text": TEXT | JSON, "prompt": TEXT | JSON, "completion": TEXT | JSON}
FIELDS |= {"messages": MESSAGES | JSON, "tools": JSON}


@given(value=st.fixed_dictionaries({}, optional=FIELDS) | JSON)
@budget(in_ci=300)
def test_records(value: Any, tokenizer: Any) -> None:
    """A label is the token beside it, or ignored."""
    try:
        ids, labels = tokens_of(Record("--data: line 1", value), tokenizer)
    except CliError as error:
        assert str(error).startswith("--data: line 1: ")
        return
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


# ---- models ----------------------------------------------------------------------------------


@contextmanager
def little_memory() -> Iterator[None]:
    """A header may ask for any size; the machine need not have it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def changed_header(draw: st.DrawFn, content: bytes, header: int) -> bytes:
    """Numbers and letters of a file's header replaced, or the file cut."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, header))
        new = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"9"])
        data[place : place + len(put)] = (put := draw(new))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data)


@given(data=st.data())
@budget(in_ci=60)
def test_models(data: st.DataObject, model: Path, tmp_path_factory: Any) -> None:
    """What loads has every tensor of the file."""
    folder = tmp_path_factory.getbasetemp() / "model"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    content = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path = folder / "model.safetensors"
    path.write_bytes(data.draw(changed_header(content, header)))
    with little_memory():
        try:
            loaded = load_model(folder, dtype=torch.bfloat16).state_dict()
        except ValueError as error:
            assert str(folder) in str(error)
            return
    for name, tensor in load_file(path).items():
        assert torch.equal(loaded[name].nan_to_num(), tensor.bfloat16().nan_to_num()), name


@given(data=st.data())
@budget(in_ci=60)
def test_gguf_files(data: st.DataObject, tmp_path_factory: Any) -> None:
    """A file that converts gives finite sizes, and weights for all of its model."""
    pytest.importorskip("gguf")
    base = tmp_path_factory.getbasetemp()
    whole, path, cache = base / "whole.gguf", base / "changed.gguf", base / "cache"
    if not whole.exists():
        write_gguf(whole)
    content = whole.read_bytes()
    path.write_bytes(data.draw(changed_header(content, content.index(b"output_norm") + 2000)))
    with little_memory():
        try:
            folder = convert_gguf(path, cache)
        except ValueError as error:
            assert str(path) in str(error)
            folder = None
    left = [p.name for p in cache.glob("gguf/*")]
    assert left == ([folder.name] if folder else [])
    shutil.rmtree(cache, ignore_errors=True)


# ---- adapters --------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(network(), LoraConfig(r=2, target_modules=["0", "2"])).save_pretrained(folder)
    return folder


@given(data=st.data())
@budget(in_ci=120)
def test_adapter_folders(data: st.DataObject, adapter: Path, tmp_path_factory: Any) -> None:
    """What loads has every tensor of the file in the model."""
    folder = tmp_path_factory.getbasetemp() / "changed"
    folder.mkdir(exist_ok=True)
    weights, config = (adapter / n for n in ("adapter_model.safetensors", CONFIG))
    new_weights, new_config = weights.read_bytes(), config.read_bytes()
    if data.draw(st.booleans()):
        new_weights = data.draw(changed(new_weights))
    elif data.draw(st.booleans()):
        fields = json.loads(new_config)
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
        new_config = json.dumps(fields).encode()
    else:
        new_config = data.draw(changed(new_config))
    (folder / weights.name).write_bytes(new_weights)
    (folder / CONFIG).write_bytes(new_config)
    try:
        model = load_adapter(network(), folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return
    loaded = model.state_dict()
    stored = load_file(folder / weights.name)
    for name, tensor in stored.items():
        key = name.replace(".weight", ".default.weight")
        assert torch.equal(loaded[key].double().nan_to_num(), tensor.double().nan_to_num())


@given(data=st.data())
@budget(in_ci=300)
def test_quant_states(data: st.DataObject) -> None:
    """Entries of a state dict, their JSON or tensors changed: a state that decodes, or an error."""
    packed, state = reference.quantize_4bit(torch.randn(4, 64 * 64), compress_statistics=True)
    entries = state.as_dict()
    (blob,) = (name for name in entries if "bitsandbytes" in name)
    if data.draw(st.booleans()):
        fields = json.loads(bytes(entries[blob].tolist()))
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
        entries[blob] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    else:
        name = data.draw(st.sampled_from(sorted(entries)))
        other = st.sampled_from([torch.zeros(0), torch.zeros(3), torch.zeros(16).half()])
        entries[name] = data.draw(other)
    try:
        decoded = QuantState.from_dict(entries)
        ops_result = fastlora_decode(packed, decoded)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert ops_result.shape == decoded.shape


def fastlora_decode(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    from fastlora import ops

    return ops.dequantize_4bit(packed, state)


@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@budget(in_ci=200)
def test_tune_caches(content: bytes, tmp_path_factory: Any) -> None:
    """A cache that can't be read counts as empty."""
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_CACHE", str(folder))
        device = cpu.device("avx2")
        tuning.cache_file(device).write_bytes(content)
        tuning._choices_of.cache_clear()
        found = tuning.lookup(device, "tile_sizes", "all")
    tuning._choices_of.cache_clear()
    assert found is None or isinstance(found, dict)
