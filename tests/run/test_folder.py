"""Which checkpoint is meant."""

import pytest

from transformer_vq.run.folder import RunError, find_step


@pytest.mark.parametrize("name", ["9" * 5000, "-1", "1.5", "٣", "", "newest\x1b[31m"])
def test_a_name_that_is_no_checkpoint_is_refused(tmp_path, name):
    with pytest.raises(RunError, match=r"^the checkpoint is '.*': it must be latest, best or a s"):
        find_step(tmp_path, name)


def test_a_step_is_a_number(tmp_path):
    assert find_step(tmp_path, "30") == 30 and find_step(tmp_path, "latest") is None
