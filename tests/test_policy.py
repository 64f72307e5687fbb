"""What a policy may say, what kernels are called, and which of several places decides."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

import attnpass
from attnpass import AttnpassError, Policy, Rule
from attnpass.ambient import resolved
from attnpass.kernels import kernels
from attnpass.ledger import Where
from attnpass.names import ALIASES, CANONICAL, canonical
from attnpass.spec import AttentionSpec
from tests.models import torchvision_stub

SPEC = AttentionSpec(
    q=(2, 8, 128, 64), k=(2, 8, 128, 64), v=(2, 8, 128, 64), dtype="float32", device="cpu", scale=0.125
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNPASS_KERNEL", raising=False)
    monkeypatch.delenv("ATTNPASS_POLICY", raising=False)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("_flash_3", "flash_3"),
        ("_native_cudnn", "native_cudnn"),
        ("_sage_qk_int8_pv_fp8_cuda_sm90", "sage_qk_int8_pv_fp8_cuda_sm90"),
        ("_flash_3_varlen_hub", "flash_varlen_3"),
        ("sdpa", "native"),
        ("eager", "keep"),
        ("flash_attention_2", "flash"),
        ("flash_attention_3", "flash_3"),
        ("flash_attention_4", "flash_4"),
        ("flex_attention", "flex"),
        ("kernels-community/flash-attn3", "flash_3_hub"),
        ("sage_attention", "sage"),
        ("torch", "native"),
        ("FLASH_ATTENTION_2", "flash"),
        (" Flash-3 ", "flash_3"),
        ("keep", "keep"),
    ],
)
def test_names_of_other_libraries_resolve(name: str, wanted: str) -> None:
    assert canonical(name) == wanted


def test_every_name_that_diffusers_has_resolves() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    for one in dispatch.AttentionBackendName:
        assert canonical(one.value) in CANONICAL


def test_every_name_that_transformers_has_resolves() -> None:
    torchvision_stub.ensure()
    modeling = pytest.importorskip("transformers.modeling_utils")
    known = [*modeling.AttentionInterface._global_mapping, "eager"]
    for name in known:
        if not name.startswith("paged|"):  # of serving, not of a model
            assert canonical(name) in (*CANONICAL, "keep")


def test_aliases_lead_to_kernels_and_hide_none() -> None:
    assert set(ALIASES.values()) <= {*CANONICAL, "keep"}
    assert not set(ALIASES) & set(CANONICAL)
    assert {kernel.name for kernel in kernels()} == set(CANONICAL)


@pytest.mark.parametrize(
    ("name", "near"), [("flsh_3", "flash_3"), ("sage_attn", "sage"), ("_natve_cudnn", "native_cudnn")]
)
def test_an_unknown_name_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(AttnpassError, match=f"no kernel '{name}'; near are .*{near}"):
        Policy(kernel=name)
    with pytest.raises(AttnpassError, match="no kernel 'zzzzzz'; known are native, "):
        Policy(kernel="zzzzzz")


# -- a policy ----------------------------------------------------------------------------------------------------------


def test_names_are_brought_into_one_form_where_a_policy_is_made() -> None:
    assert Policy(kernel="_flash_3").kernel == "flash_3"
    assert Policy(kernel=["_flash_3", "flash_3", "sdpa"]).kernel == ("flash_3", "native")
    assert Policy(kernel="_flash_3, sdpa,").kernel == ("flash_3", "native")
    by_mapping = Policy(rules={"encoder.*": "_flash_3", "gpt.py:41": ["flash", "eager"]})
    assert by_mapping.rules == (Rule("encoder.*", "flash_3"), Rule("gpt.py:41", ("flash", "keep")))
    assert Policy(rules=[Rule("a", "flash")]).rules == (Rule("a", "flash"),)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernl": "flash"}, "unknown option 'kernl'; did you mean 'kernel'?"),
        ({"zzzzzz": 1}, "unknown option 'zzzzzz'; known are allow_approximate, "),
        ({"kernel": 3}, "option 'kernel' is the name of a kernel or a list of names, not 3"),
        ({"kernel": ["flash", 3]}, "a list of names"),
        ({"kernel": []}, "option 'kernel' names no kernel"),
        ({"kernel": " , "}, "names no kernel"),
        ({"kernel": ["keep", "flash"]}, "nothing can come after 'keep'"),
        ({"rules": {"a.*": "flsh"}}, "the rule for 'a.*': there is no kernel 'flsh'; near are flash"),
        ({"rules": {"": "flash"}}, "a rule is for a module"),
        ({"rules": {3: "flash"}}, "a rule is for a module"),
        ({"rules": {"a": None}}, "the rule for 'a' is the name of a kernel"),
        ({"rules": "flash"}, "option 'rules' says which sites"),
        ({"rules": [("a", "flash")]}, "option 'rules' says which sites"),
        ({"allow_approximate": 1}, "option 'allow_approximate' is True or False, not 1"),
        ({"strict_kernel": "yes"}, "option 'strict_kernel' is True or False"),
        ({"strict": None}, "option 'strict' is True or False"),
        ({"fuel": True}, "option 'fuel' is None or a number of sites"),
        ({"fuel": -1}, "option 'fuel'"),
        ({"min_gain": "a lot"}, "option 'min_gain' is a share below 1"),
        ({"min_gain": 1}, "option 'min_gain'"),
        ({"min_gain": math.nan}, "option 'min_gain'"),
        ({"min_gain": True}, "option 'min_gain'"),
    ],
)
def test_what_is_wrong_is_an_error_that_says_so(options: dict[str, Any], text: str) -> None:
    with pytest.raises(AttnpassError) as caught:
        Policy.from_options(options)
    assert text in str(caught.value)


def wide(spec: AttentionSpec) -> bool:
    return spec.qk_width == 128


def test_a_policy_is_plain_data() -> None:
    policy = Policy(kernel=["flash_3", "flash"], rules={"a.*": "keep", wide: "flash"}, min_gain=0.1)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(policy) == hash(dataclasses.replace(policy))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.kernel = "flash"  # type: ignore[misc]


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "where", "fits"),
    [
        ("encoder.*", Where(module="encoder.layers.0.attn"), True),
        ("encoder.*", Where(module="encoder"), False),
        ("encoder", Where(module="encoder.layers.0.attn.softmax"), True),
        ("encoder", Where(module="encoder_2.attn"), False),
        ("*.cross_attn", Where(module="decoder.1.cross_attn"), True),
        ("*.cross_attn", Where(module="decoder.1.cross_attn.softmax"), True),
        ("*.cross_attn", Where(module="decoder.1.cross_attn_2"), False),
        ("layers.[01].*", Where(module="layers.1.attn"), True),
        ("layers.[01].*", Where(module="layers.2.attn"), False),
        ("*", Where(module=None), True),
        ("Encoder", Where(module="encoder"), False),
        ("gpt.py:41", Where(module="a", file="/home/me/gpt.py", line=41), True),
        ("gpt.py:41", Where(module="a", file="/home/me/gpt.py", line=42), False),
        ("gpt.py:41", Where(module="a", file="/home/me/nanogpt.py", line=41), False),
        ("me/gpt.py:41", Where(file="/home/me/gpt.py", line=41), True),
        ("you/gpt.py:41", Where(file="/home/me/gpt.py", line=41), False),
        ("/home/me/gpt.py:41", Where(file="/home/me/gpt.py", line=41), True),
        ("gpt.py:41", Where(module="gpt.py:41"), False),
        (lambda spec: spec.keys == 128, Where(), True),
        (lambda spec: spec.keys == 64, Where(), False),
    ],
)
def test_a_rule_is_for_modules_a_source_line_or_a_meaning(match: Any, where: Where, fits: bool) -> None:
    assert Rule(match, "flash").fits(where, SPEC) is fits


def test_the_first_rule_that_matches_wins_over_the_others_and_over_kernel() -> None:
    policy = Policy(kernel="native", rules={"a.*": "keep", "*.x": ["flash", "flex"]})
    assert policy.asked(Where(module="a.x"), SPEC) == ("keep",)
    assert policy.asked(Where(module="b.x"), SPEC) == ("flash", "flex")
    assert policy.asked(Where(module="b.y"), SPEC) == ("native",)
    assert Policy().asked(Where(module="b.y"), SPEC) == ()


# -- where it comes from -----------------------------------------------------------------------------------------------


def test_the_nearest_place_decides_field_by_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolved() == Policy()
    monkeypatch.setenv("ATTNPASS_KERNEL", "_flash_3,flash")
    assert resolved().kernel == ("flash_3", "flash")
    (tmp_path / "policy.json").write_text('{"kernel": "flex", "min_gain": 0.5, "fuel": 3, "strict": true}')
    monkeypatch.setenv("ATTNPASS_POLICY", str(tmp_path / "policy.json"))
    assert resolved() == Policy(kernel="flex", min_gain=0.5, fuel=3, strict=True)
    with attnpass.policy(kernel="xformers", min_gain=0.25) as outer:
        assert outer == resolved() == Policy(kernel="xformers", min_gain=0.25, fuel=3, strict=True)
        with attnpass.policy(min_gain=0.0, strict=False):
            assert resolved() == Policy(kernel="xformers", min_gain=0.0, fuel=3)
            assert resolved({"kernel": None, "fuel": None}) == Policy()
            assert resolved(Policy(kernel="sage")) == Policy(kernel="sage", fuel=3)
        assert resolved() == outer
    assert resolved().kernel == "flex"


def test_an_inner_block_ends_where_an_error_leaves_it() -> None:
    with pytest.raises(KeyError), attnpass.policy(kernel="flash"):
        raise KeyError
    assert resolved() == Policy()


def test_a_block_is_of_its_own_thread() -> None:
    seen: list[Policy] = []
    with attnpass.policy(kernel="flash"):
        thread = threading.Thread(target=lambda: seen.append(resolved()))
        thread.start()
        thread.join()
    assert seen == [Policy()]


def test_a_wrong_option_of_a_block_is_an_error_at_the_block() -> None:
    with pytest.raises(AttnpassError, match="did you mean 'kernel'"), attnpass.policy(kernl="flash"):
        raise AssertionError("never entered")


def test_a_policy_may_be_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"rules": {"encoder.*": "flash", "*.cross_attn": "keep"}, "allow_approximate": True})
    monkeypatch.setenv("ATTNPASS_POLICY", f" {text} ")
    assert resolved() == Policy(rules={"encoder.*": "flash", "*.cross_attn": "keep"}, allow_approximate=True)
    monkeypatch.setenv("ATTNPASS_POLICY", "")
    assert resolved() == Policy()


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("ATTNPASS_KERNEL", "flsh", "there is no kernel 'flsh'"),
        ("ATTNPASS_KERNEL", ",", "names no kernel"),
        ("ATTNPASS_POLICY", "nowhere.json", "nowhere.json cannot be read: No such file"),
        ("ATTNPASS_POLICY", ".", ". cannot be read"),
        ("ATTNPASS_POLICY", '{"kernel": "fla', "the text is no JSON, or only part of it"),
        ("ATTNPASS_POLICY", "half.json", "half.json is no JSON, or only part of it"),
        ("ATTNPASS_POLICY", "empty.json", "empty.json is empty"),
        ("ATTNPASS_POLICY", "list.json", "list.json is no JSON object"),
        ("ATTNPASS_POLICY", "bytes.json", "bytes.json is no text"),
        ("ATTNPASS_POLICY", '{"kernl": "flash"}', "unknown option 'kernl'; did you mean 'kernel'?"),
        ("ATTNPASS_POLICY", '{"strict": "yes"}', "option 'strict' is True or False"),
        ("ATTNPASS_POLICY", '{"min_gain": NaN}', "option 'min_gain'"),
    ],
)
def test_a_wrong_environment_names_the_variable(
    variable: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "half.json").write_text('{"kernel": "flash"')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "list.json").write_text('["flash"]')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x81")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(AttnpassError) as caught:
        resolved()
    assert str(caught.value).startswith(f"{variable}: ")
    assert text in str(caught.value)


def test_the_function_policy_is_not_replaced_by_the_module_of_that_name() -> None:
    import importlib

    assert importlib.import_module("attnpass.policy").Policy is Policy
    assert callable(attnpass.policy)
