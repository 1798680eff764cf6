"""The CUDA kernels without a GPU: their source runs on the host, one CTA at a time (csrc/tests/cuda_emulation)."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvzip.attention import QuantizedKV, quantize

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "csrc/tests/cuda_emulation"
TORCH = Path(torch.__file__).parent
SOURCES = ("emulation.cpp", "instructions.cpp")
INCLUDES = [f"-I{path}" for path in (EMULATION, ROOT / "csrc/cuda", ROOT / "csrc/include")]
ATTEND = (
    "attend(Tensor query, Tensor? keys, Tensor? values, Tensor? cu_seqlens, Tensor? cu_tiles, Tensor? mask, "
    "Tensor tail_keys, Tensor tail_values, int tail_length, Tensor? tail_cursor, Tensor? tail_skip, float scaling, "
    "float? softcap, Tensor? sinks, int bits=0, Tensor? key_codes=None, Tensor? value_codes=None, "
    "Tensor? key_scales=None, Tensor? value_scales=None, Tensor? quantized_cu_seqlens=None, "
    "Tensor? quantized_cu_tiles=None, Tensor? quantized_mask=None) -> (Tensor out, Tensor lse)"
)
COLUMN_MAX = "column_max(Tensor query, Tensor keys, Tensor lse, float scaling, float? softcap) -> Tensor"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # about a unit in the last place of 2

gxx = shutil.which("g++")
needs_gxx = pytest.mark.skipif(gxx is None, reason="no g++ to compile the emulation with")


def build(output: Path, *arguments: str) -> Path:
    command = [str(gxx), "-std=c++17", "-O1", "-Wno-unknown-pragmas", *INCLUDES, *arguments, "-o", str(output)]
    subprocess.run(command, check=True, cwd=EMULATION)
    return output


@needs_gxx
@pytest.mark.slow
def test_kernels_agree_with_float64_under_emulation(tmp_path: Path) -> None:
    driver = build(tmp_path / "emulated", *SOURCES, "main.cpp")
    done = subprocess.run([driver], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))
    assert re.search(r"^0 of \d{3} cases failed", done.stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The ops of csrc/cuda/bindings.cpp, for CPU tensors and with emulated kernels."""
    if gxx is None:
        pytest.skip("no g++ to compile the emulation with")
    library = build(
        tmp_path_factory.mktemp("emulation") / "ops.so",
        *("-shared", "-fPIC", "-DKVZIP_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH}/include"),
        *(*SOURCES, "emulated_launch.cpp", str(ROOT / "csrc/cuda/bindings.cpp")),
        *(f"-L{TORCH}/lib", "-ltorch_cpu"),
    )
    definitions = torch.library.Library("kvzip_emulated", "DEF")
    definitions.define(ATTEND)
    definitions.define(COLUMN_MAX)
    torch.ops.load_library(library)
    yield torch.ops.kvzip_emulated
    definitions._destroy()


def inputs(dtype: torch.dtype, lengths: list[int], batch: int = 2, q_len: int = 3, head_dim: int = 64) -> dict:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    per_head = torch.tensor([0, *lengths])
    return {
        "query": normal(batch, q_len, 6, head_dim).transpose(1, 2),
        "keys": normal(sum(lengths), head_dim),
        "values": normal(sum(lengths), head_dim),
        "cu_seqlens": per_head.cumsum(0),
        "cu_tiles": (per_head + 63).div(64, rounding_mode="floor").cumsum(0),
        "mask": None,
        "tail_keys": normal(batch, len(lengths), 20, head_dim),
        "tail_values": normal(batch, len(lengths), 20, head_dim),
        "tail_length": 11,
        "tail_cursor": None,
        "tail_skip": None,
        "scaling": head_dim**-0.5,
        "softcap": None,
        "sinks": None,
    }


def quantized(call: dict, lengths: tuple[int, ...], bits: int, mask: Tensor | None = None) -> QuantizedKV:
    """Quantised rows after those of the context, with a channel of large keys; adds them to the arguments."""
    generator = torch.Generator().manual_seed(5)
    shape, dtype = (sum(lengths), call["query"].shape[-1]), call["query"].dtype
    keys, values = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    keys[:, 7] = 20 + keys[:, 7] * 5
    rows = quantize(keys.to(dtype), values.to(dtype), lengths, bits)
    names = ("bits", *rows.tensors, "quantized_cu_seqlens", "quantized_cu_tiles", "quantized_mask")
    call |= zip(names, (bits, *rows.tensors.values(), rows.cu_seqlens, rows.cu_tiles, mask), strict=True)
    return rows


def expected(call: dict, rows: QuantizedKV | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Plain attention in `dtype` to what the ops are given and `rows`, without skips, caps and sinks."""
    query = call["query"].to(dtype)
    batch, heads, q_len, _ = query.shape
    kv_heads = call["tail_keys"].shape[1]
    output, lse = torch.empty_like(query), torch.empty(batch, heads, q_len, dtype=dtype)
    bounds = call["cu_seqlens"].tolist()
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            stored, own = slice(bounds[kv], bounds[kv + 1]), slice(0, call["tail_length"])
            parts = [(call["keys"][stored], call["values"][stored])]
            if rows is not None:
                seen = slice(None) if call["quantized_mask"] is None else call["quantized_mask"][kv]
                parts.append(tuple(states[seen] for states in rows.dequantized(kv, 0, rows.lengths[kv])))
            parts.append((call["tail_keys"][b, kv, own], call["tail_values"][b, kv, own]))
            keys, values = (torch.cat([state.to(dtype) for state in states]) for states in zip(*parts, strict=True))
            last = keys.shape[0] - q_len + torch.arange(q_len)
            logits = query[b, h] @ keys.T * call["scaling"]
            logits.masked_fill_(torch.arange(keys.shape[0]) > last[:, None], -torch.inf)
            output[b, h], lse[b, h] = logits.softmax(-1) @ values, logits.logsumexp(-1)
    return output.transpose(1, 2), lse


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_op_agrees_with_plain_attention(ops, dtype: torch.dtype) -> None:
    call = inputs(dtype, [70, 0, 130])
    output, lse = ops.attend(*call.values())
    want_output, want_lse = expected(call)
    assert output.shape == (2, 3, 6, 64)
    assert output.is_contiguous()
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), want_output, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_quantised_rows_are_read_as_what_they_stand_for(ops, dtype: torch.dtype, bits: int, head_dim: int) -> None:
    for lengths, batch, q_len in (((0, 130, 65), 1, 1), ((1, 64, 0), 2, 3)):
        call = inputs(dtype, [3, 3, 3], batch, q_len, head_dim)
        rows = quantized(call, lengths, bits)
        output, lse = ops.attend(**call)
        exact, exact_lse = expected(call, rows)
        plain, _ = expected(call, rows, dtype)
        assert output.dtype == dtype
        allowed = 4 * float((plain.double() - exact).abs().max()) + 1e-6
        assert float((output.double() - exact).abs().max()) <= allowed
        torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows_that_are_masked_are_not_seen(ops, bits: int) -> None:
    call = inputs(torch.float16, [0, 0, 0])
    mask = torch.rand(3, 100, generator=torch.Generator().manual_seed(6)) < 0.5
    mask[1] = False
    rows = quantized(call, (100, 100, 100), bits, mask)
    torch.testing.assert_close(ops.attend(**call)[1].double(), expected(call, rows)[1], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_no_quantised_rows_change_nothing(ops) -> None:
    call = inputs(torch.bfloat16, [70, 0, 130])
    want, _ = ops.attend(**call)
    quantized(call, (0, 0, 0), 8)
    assert torch.equal(ops.attend(**call)[0], want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "bits is 2; expected 8, 4, or 0 without codes"),
        ({"bits": 4}, r"key_codes has shape \(60, 64\); expected \(60, 32\)"),
        ({"value_codes": None}, "must all be given with bits 8"),
        ({"value_codes": torch.zeros(60, 64)}, "value_codes must be uint8"),
        ({"value_codes": torch.zeros(59, 64, dtype=torch.uint8)}, r"value_codes has shape \(59, 64\)"),
        ({"key_codes": torch.zeros(60, 65, dtype=torch.uint8)[:, :64]}, "key_codes must be contiguous"),
        ({"key_scales": torch.zeros(3, 2, 64)}, "key_scales must be float16"),
        ({"key_scales": torch.zeros(3, 1, 64, dtype=torch.float16)}, "key_scales has shape"),
        ({"value_scales": torch.zeros(60, dtype=torch.float16)}, "value_scales has shape"),
        ({"quantized_cu_tiles": torch.zeros(3, dtype=torch.int64)}, "quantized_cu_tiles has shape"),
        ({"quantized_mask": torch.ones(3, 21, dtype=torch.bool)}, r"quantized_mask has shape \(3, 21"),
    ],
)
def test_a_wrong_argument_of_quantised_rows_is_named(ops, change: dict, message: str) -> None:
    call = inputs(torch.bfloat16, [3, 3, 3])
    quantized(call, (20, 20, 20), 8)
    with pytest.raises(RuntimeError, match=message):
        ops.attend(**call | change)


@pytest.mark.slow
def test_a_query_that_is_not_aligned_gives_the_same(ops) -> None:
    call = inputs(torch.bfloat16, [70, 0, 130])
    want, _ = ops.attend(*call.values())
    storage = torch.zeros(*call["query"].shape[:3], 67, dtype=torch.bfloat16)
    storage[..., 3:] = call["query"]
    dense = torch.zeros(call["query"].numel() + 3, dtype=torch.bfloat16)[3:].view_as(call["query"])
    dense.copy_(call["query"])
    assert dense.is_contiguous()  # and yet no row begins at a multiple of 16 bytes
    for query in (storage[..., 3:], dense):
        call["query"] = query
        assert torch.equal(ops.attend(*call.values())[0], want)


@pytest.mark.slow
def test_the_length_on_the_device_is_the_one_that_counts(ops) -> None:
    call = inputs(torch.bfloat16, [70, 0, 130])
    want, _ = ops.attend(*call.values())
    call |= {"tail_cursor": torch.tensor([11]), "tail_length": 20}
    assert torch.equal(ops.attend(*call.values())[0], want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail_keys": torch.zeros(2, 3, 20, 65)[..., :64]}, "tail_keys and query must have the same dtype"),
        ({"tail_values": torch.zeros(2, 3, 20, 65, dtype=torch.bfloat16)[..., :64]}, "tail_values must have a contig"),
        ({"query": torch.zeros(2, 6, 3, 80, dtype=torch.bfloat16)}, "query has head_dim 80; expected one of 64"),
        ({"query": torch.zeros(2, 7, 3, 64, dtype=torch.bfloat16)}, "query has 7 heads"),
        ({"query": torch.zeros(2, 6, 3, 64, dtype=torch.float64)}, "query has an unsupported dtype"),
        ({"cu_tiles": None}, "must all be given, or none"),
        ({"cu_tiles": torch.zeros(3, dtype=torch.int64)}, r"cu_tiles has shape \(3\); expected \(4\)"),
        ({"cu_seqlens": torch.zeros(4, dtype=torch.int32)}, "cu_seqlens must be int64"),
        ({"values": torch.zeros(7, 64, dtype=torch.bfloat16)}, r"values has shape \(7, 64\)"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, "mask"),
        ({"tail_length": 21}, "tail_length is 21; expected from q_len 3 to the capacity 20"),
        ({"tail_length": 2}, "tail_length is 2; expected from q_len 3"),
        ({"tail_skip": torch.zeros(1, 2, dtype=torch.int64)}, r"tail_skip has shape \(1, 2\)"),
        ({"sinks": torch.zeros(5)}, r"sinks has shape \(5\)"),
        ({"softcap": -1.0}, "softcap must be positive"),
    ],
)
def test_a_wrong_argument_is_named(ops, change: dict, message: str) -> None:
    call = inputs(torch.bfloat16, [70, 0, 130]) | change
    with pytest.raises(RuntimeError, match=message):
        ops.attend(*call.values())


@pytest.mark.slow
def test_column_max_agrees_with_plain_tensors(ops) -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(4, 70, 64, generator=generator).bfloat16()
    keys = torch.randn(90, 2, 64, generator=generator).bfloat16().transpose(0, 1)
    lse = torch.randn(4, 70, generator=generator)
    logits = query.double() @ keys.repeat_interleave(2, dim=0).double().transpose(1, 2) * 0.125
    want = ((30 * torch.tanh(logits / 30)) - lse[..., None]).amax(1)
    torch.testing.assert_close(ops.column_max(query, keys, lse, 0.125, 30.0).double(), want, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90", "100", "120"])
def test_nvcc_compiles_without_spills(architecture: str) -> None:
    command = [sys.executable, str(ROOT / "tools/inspect_cuda.py"), "--architectures", architecture]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
