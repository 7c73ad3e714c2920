import re

import pytest
import yaml

from dist_pca.errors import UserError
from dist_pca.resources import Kind, names, resource


@pytest.mark.parametrize("kind", ["configs", "shards", "launch"])
def test_shipped_files_are_found_with_and_without_their_ending(kind: Kind) -> None:
    for name in names(kind):
        assert resource(kind, name) == resource(kind, f"{name}.yaml")
        assert resource(kind, name).is_file()


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UserError, match=r"configs/gta_to_cityscapes: .* the nearest is gta5_to_cityscapes"):
        resource("configs", "gta_to_cityscapes")


@pytest.mark.parametrize("name", names("launch"))
def test_every_launcher_starts_deepspeed_at_the_stage_of_its_name(name: str) -> None:
    values = yaml.safe_load(resource("launch", name).read_text())
    settings = values["deepspeed_config"]
    assert values["distributed_type"] == "DEEPSPEED"
    named = re.search(r"zero(\d)", name)
    if named:
        assert settings["zero_stage"] == int(named[1])
    assert ("offload_optimizer_device" in settings) == name.endswith("offload")
    if values["num_machines"] == 1:
        assert values["main_process_port"] == 0
    if values["num_machines"] > 1:
        assert values["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
