import jax
import numpy as np
import pytest

from bert_jax import sharding
from bert_jax.errors import InputError
from bert_jax.settings import Mesh


def test_mesh_takes_all_devices_or_as_many_as_asked():
    assert sharding.mesh(Mesh()).shape == {"data": 8}
    assert sharding.mesh(Mesh(data=2)).shape == {"data": 2}
    with pytest.raises(InputError, match=r"mesh.data is 9; there are 8 devices"):
        sharding.mesh(Mesh(data=9))
    with pytest.raises(InputError, match=r"mesh.data is 0"):
        sharding.mesh(Mesh(data=0))


def test_a_batch_is_shared_out_and_parameters_are_whole_everywhere():
    mesh = sharding.mesh(Mesh())
    batch = sharding.put_batch({"inputs": {"input_ids": np.arange(32).reshape(16, 2)}}, mesh)
    ids = batch["inputs"]["input_ids"]
    assert [shard.data.shape for shard in ids.addressable_shards] == [(2, 2)] * 8
    np.testing.assert_array_equal(ids, np.arange(32).reshape(16, 2))
    weight = jax.device_put(np.ones(3), sharding.replicated(mesh))
    assert [shard.data.shape for shard in weight.addressable_shards] == [(3,)] * 8
