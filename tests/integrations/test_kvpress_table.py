"""What stands for each of kvpress's presses, and that it keeps what kvpress keeps."""

import dataclasses
import importlib
from functools import cache

import pytest
import torch

from kvzip.integrations import kvpress
from kvzip.integrations.compression import kept, scorers_of
from kvzip.integrations.kvpress import PRESSES, ComposedPress, PerLayerCompressionPress, ScorerPress, press
from kvzip.kvcache import get_level
from kvzip.scoring import get_scorer
from tests.integrations.pressed import NEED_FILES, SNAPKV, make, run
from tests.parity import golden

# -- what stands for what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESSES))
def test_every_press_of_the_table_can_be_made_and_knows_its_scorer_and_level(name):
    found = make(name)
    assert repr(found).startswith(f"{name}(")
    assert isinstance(found, ScorerPress)
    if name not in NEED_FILES:
        (first, *others) = found.scorers()
        assert first.name == (PRESSES[name].scorer or "snapkv")
        assert [one.name for one in others] == list(PRESSES[name].beside)
        assert found.level() is None or get_level(found.level())


@pytest.mark.parametrize(
    ("name", "settings", "scorer", "level"),
    [
        ("SnapKVPress", {"window_size": 8}, "snapkv(window_size=8)", "pair-uniform"),
        ("ExpectedAttentionPress", {"n_future_positions": 32}, "expected_attention(n_future=32)", "pair-uniform"),
        ("KVzipPress", {}, "kvzip", "pair"),
        ("KVzipPress", {"layerwise": True}, "kvzip", "adakv(alpha=0)"),
        ("KVzipPress", {"kvzip_plus_normalization": True, "n_sink": 4}, "kvzip_plus(n_sink=4)", "pair"),
        ("KVComposePress", {"agg_head": "max"}, "kvcompose", "kvcompose(agg_head='max', keep_token_lower_bound=0)"),
        ("KVComposePress", {"structured": False}, "kvcompose", "pair"),
        ("PyramidKVPress", {"beta": 4}, "pyramidkv(beta=4)", "pyramid(beta=4)"),
        ("AdaKVPress", {"alpha_safeguard": 0.3}, SNAPKV, "adakv(alpha=0.3)"),
    ],
)  # fmt: skip
def test_settings_go_to_the_scorer_and_the_level(name, settings, scorer, level):
    found = make(name, **settings)
    assert found.scorers() == (get_scorer(scorer),)
    assert get_level(found.level()) == get_level(level)


def test_the_first_argument_is_the_fraction_removed_and_can_be_changed_later():
    found = kvpress.SnapKVPress(0.7, 8)
    assert (found.compression_ratio, found.window_size) == (0.7, 8)
    found.compression_ratio, found.window_size = 0.9, 16
    (step,) = found.steps()
    assert step.ratio == 0.1
    assert step.scorers == (get_scorer("snapkv(window_size=16)"),)
    around = kvpress.AdaKVPress(found)
    around.compression_ratio = 0.25
    assert found.compression_ratio == 0.25
    assert around.steps()[0].ratio == 0.75


def test_presses_are_dataclasses_that_compare_and_can_be_pickled():
    found = kvpress.SnapKVPress(0.5)
    assert dataclasses.is_dataclass(found)
    assert found == kvpress.SnapKVPress(compression_ratio=0.5)
    assert found != kvpress.SnapKVPress(0.5, window_size=8)
    assert kvpress.SnapKVPress is importlib.import_module(kvpress.SnapKVPress.__module__).SnapKVPress


def test_unknown_presses_are_named_with_the_nearest():
    with pytest.raises(ImportError, match=r"SnapKvPress.*did you mean SnapKVPress"):
        from kvzip.integrations.kvpress import SnapKvPress  # noqa: F401
    with pytest.raises(AttributeError, match="nothing_such"):
        kvpress.nothing_such  # noqa: B018
    assert {"SnapKVPress", "AdaKVPress", "ComposedPress"} <= set(dir(kvpress))


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: press("snapkw"), r"snapkw.*did you mean 'snapkv'"),
        (lambda: press("snapkv", 1.0), r"compression_ratio.*\[0, 1\).*1.0"),
        (lambda: press("snapkv", 0.5, level="pairs"), r"pairs.*did you mean 'pair'"),
        (lambda: kvpress.SnapKVPress(-0.1).steps(), r"compression_ratio.*-0.1"),
        (lambda: kvpress.SnapKVPress("0.5").steps(), r"compression_ratio.*'0.5'"),
        (lambda: kvpress.SnapKVPress(0.5, window_size=0).steps(), r"window_size.*0"),
        (lambda: kvpress.AdaKVPress(ComposedPress([])), r"AdaKVPress wraps.*SnapKVPress.*ComposedPress"),
        (lambda: kvpress.AdaKVPress(make("ChunkKVPress")), r"AdaKVPress wraps.*ChunkKVPress"),
        (lambda: PerLayerCompressionPress(press("knorm"), []), "compression_ratios is empty"),
        (lambda: ComposedPress(press("knorm", 0.5)), "ComposedPress takes a list.*KNorm"),
        (lambda: ComposedPress(["knorm"]), "ComposedPress takes a list.*'knorm'"),
        (lambda: ComposedPress([make("SimLayerKVPress")]).compression_ratio, "SimLayerKVPress.*no compression_ratio"),
        (lambda: press("knorm", 0.5)("gpt2"), "transformers model.*'gpt2'"),
        (lambda: scorers_of(ComposedPress([press("snapkv", 0.5), press(SNAPKV, 0.5)]).steps()), "snapkv.*two settings"),
    ],
)
def test_bad_settings_are_refused(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it()


def test_the_fraction_kept_is_what_a_user_would_write():
    assert [kept(one) for one in (0, 0.1, 0.7, 0.9, 0.95)] == [1, 0.9, 0.3, 0.1, 0.05]


# -- kvpress's own numbers ---------------------------------------------------------------------------------------------

DIFFERENT = {
    ("criticalkv", "knorm"): "negative scores are shifted here",
    ("criticalkv", "keydiff"): "negative scores are shifted here",
    ("criticaladakv", "knorm"): "negative scores are shifted here",
    ("criticaladakv", "keydiff"): "negative scores are shifted here",
    ("chunk", "snapkv16_len128"): "kvpress takes queries at wrong positions",
    ("chunk", "keydiff_len128"): "kvpress scores each chunk as if it were alone",
    ("chunk", "keydiff_len16"): "as above",
    ("chunkkv", "knorm_len20"): "half of 35 chunks are 18 here, 17 in kvpress",
    ("chunkkv", "keydiff_len20"): "as above",
    ("chunkkv", "snapkv_len20"): "as above",
    ("block", "keydiff_block128"): "rescored here only where a function is given",
    ("block", "keydiff_ratio075_block64"): "as above",
    ("block", "keydiff_ratio075_block8"): "as above",
    ("cur", "random_leverage"): "another random sketch",
    ("kvcompose", "no_head_mean"): "a tie between layers at the cut",
}
FAMILIES = {
    *(
        "knorm",
        "snapkv",
        "tova",
        "observed_attention",
        "streaming_llm",
        "expected_attention",
        "keydiff",
        "lagkv",
        "cap",
    ),
    *("cur", "pyramidkv", "kvcompose", "simlayerkv", "chunkkv", "entropy_gated_chunkkv", "chunk", "block"),
    *("criticalkv", "adakv", "criticaladakv"),
}


@cache
def cases():
    path = golden.ROOT / "kvpress" / "MANIFEST.json"
    if not path.is_file():
        return []
    manifest = golden.manifest("kvpress")
    found = []
    for file, facts in sorted(manifest["files"].items()):
        if "/N700/" in file and facts.get("press") in FAMILIES:
            name = manifest["presses"][facts["press"]]["class"]
            found += [
                (file, facts["press"], name, variant, one["hyperparameters"])
                for variant, one in facts["variants"].items()
                if (facts["press"], variant) not in DIFFERENT
            ]
    return found


@pytest.mark.skipif(not cases(), reason="no golden files of kvpress")
@pytest.mark.parametrize(("file", "family", "name", "variant", "settings"), cases(), ids=lambda one: str(one)[:40])
def test_a_press_keeps_what_kvpress_keeps(file, family, name, variant, settings):
    """One import changed: the same class with the same settings leaves the same pairs in the cache."""
    cls = getattr(kvpress, name)
    inner = settings.get("press")
    known = {one.name for one in dataclasses.fields(cls)} - {"press"}
    given = {key: value for key, value in settings.items() if key in known}
    if inner is not None:
        wrapped = eval(inner if "(" in inner else f"{inner}()", {key: getattr(kvpress, key) for key in PRESSES})
        wrapped.compression_ratio = settings["compression_ratio"]
        found = cls(wrapped, **given)
    else:
        found = cls(**given)
    arch = file.split("/")[0]
    context = golden.tensors("kvpress", f"{arch}/N700/inputs.safetensors")["input_ids"][0].tolist()
    tensors = golden.tensors("kvpress", file)
    expected = tensors[f"{variant}.kept_mask"].bool()
    unclear = tensors.get(f"{variant}.ambiguous_mask", torch.zeros_like(expected)).bool()
    if family == "simlayerkv":
        found.n_recent_kept = settings["n_recent"] - settings["n_last"]
    kv = run(golden.model(f"kvpress/{arch}/model").model, found, context=context)
    assert torch.equal(kv.keep_mask[~unclear], expected[~unclear])
    assert int((kv.keep_mask != expected).sum()) <= int(unclear.sum())
