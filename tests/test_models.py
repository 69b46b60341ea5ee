"""Parameter counts of the shapes in conf/model against published ones.

EXACT: the counts that Hugging Face shows for the weights whose config.json a shape comes from ("Safetensors: model
size"), from memory. ROUNDED: what papers and model cards print. ACTIVE: what they print as activated for a token. Some
count what foretold leaves out: Gopher and Chinchilla project relative positions with one more hidden × hidden matrix a
layer, which rope stands for here; BLOOM norms its embedding; OLMo 2 norms queries and keys over the full width.
"""

from pathlib import Path

import pytest
import yaml

from conf.arithmetic import active_parameters, parameters
from conf.node import build
from conf.plan import Model, Tokenizer

CONF = Path(__file__).parent.parent / "conf"

EXACT = {
    "opt_1_3b": 1_315_758_080, "bloom_176b": 176_247_271_424, "bloom_7b1": 7_069_016_064,
    "llama_7b": 6_738_415_616, "llama_13b": 13_015_864_320, "llama_33b": 32_528_943_616, "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_34b": 33_743_970_304, "llama2_70b": 68_976_648_192,
    "llama_1b": 1_235_814_400, "llama3_2_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_405b": 405_853_388_800,
    "mixtral_8x7b": 46_702_792_704, "mixtral_8x22b": 140_630_071_296,
    "deepseek_v2_lite": 15_706_484_224, "deepseek_v2": 235_741_434_880,
    "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264, "qwen3_30b_a3b": 30_532_122_624, "qwen3_235b_a22b": 235_093_634_560,
    "olmo2_7b": 7_298_617_344, "olmo2_13b": 13_716_198_400,
}  # fmt: skip

ROUNDED = {
    "gpt3_175b": 174.6e9, "gpt3_13b": 12.85e9, "gpt3_6_7b": 6.66e9, "gpt3_1_3b": 1.32e9,
    "opt_175b": 175e9, "opt_66b": 66e9, "opt_30b": 30e9, "deepseek_v3": 671e9,
    "gopher_280b": 280e9 - 80 * 16384**2, "chinchilla_70b": 70e9 - 80 * 8192**2,
}  # fmt: skip

ACTIVE = {
    "mixtral_8x7b": 12.9e9, "mixtral_8x22b": 39e9, "deepseek_v2": 21e9, "deepseek_v3": 37e9,
    "qwen3_30b_a3b": 3.3e9, "qwen3_235b_a22b": 22e9,
}  # fmt: skip


def read(kind, path):
    problems = []
    node = build(kind, yaml.safe_load(path.read_text()), kind.__name__.lower(), problems)
    assert not problems
    return node


def shape(name):
    return read(Model, CONF / "model" / f"{name}.yaml")


@pytest.mark.parametrize("kind", [Model, Tokenizer])
def test_every_file_builds_under_its_own_name(kind):
    paths = sorted((CONF / kind.__name__.lower()).glob("*.yaml"))
    assert [read(kind, path).name for path in paths] == [path.stem for path in paths] != []


@pytest.mark.parametrize("name", EXACT)
def test_parameters_match_the_weights(name):
    assert parameters(shape(name)) == pytest.approx(EXACT[name], rel=1e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_match_the_paper(name):
    assert parameters(shape(name)) == pytest.approx(ROUNDED[name], rel=0.015)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_match_the_paper(name):
    assert active_parameters(shape(name)) == pytest.approx(ACTIVE[name], rel=0.04)


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "model").glob("tiny_*.yaml")])
def test_tiny_twins_are_tiny(name):
    assert parameters(shape(name)) < 5e6
