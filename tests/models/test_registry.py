import pytest

from resnet_jax import InputError, create_model, list_models
from resnet_jax.models.registry import count_parameters

PARAMETERS = {  # timm's own counts; the nets for CIFAR by the arithmetic of their papers
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet200": 64_673_832,
    "resnet50d": 25_576_264,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnetv2_50": 25_549_352,
    "resnetv2_101": 44_541_480,
    "resnetv2_152": 60_185_128,
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet1202": 19_421_274,
    "cifar_resnetv2_164": 1_703_258,
    "cifar_resnetv2_1001": 10_327_706,
    "cifar_wrn_28_10": 36_479_194,
    "cifar_resnet18": 11_173_962,
}


@pytest.mark.parametrize("name", list_models())
def test_parameter_count(name):
    twin = name.replace("plain", "resnet")
    assert count_parameters(create_model(name)) == PARAMETERS[twin]


def test_projection_shortcuts_add_what_the_paper_says():
    assert count_parameters(create_model("cifar_resnet20", shortcut="B")) == 269_722 + 2_752


def test_list_models_matches_a_pattern():
    assert list_models("resnext*") == ["resnext101_32x8d", "resnext50_32x4d"]


def test_unknown_model_names_the_nearest():
    with pytest.raises(InputError, match="resnet50"):
        create_model("rsnet50")


def test_unknown_field_names_the_nearest():
    with pytest.raises(InputError, match="num_classes"):
        create_model("resnet50", num_clases=3)
