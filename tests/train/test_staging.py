import pytest
import torch

from casallm.train.staging import Staging


def test_a_copy_is_not_touched_by_what_happens_to_the_tensor():
    tensors = {"w": torch.ones(3), "transposed": torch.arange(6).reshape(2, 3).T}

    copies = Staging().copy(tensors)
    for tensor in tensors.values():
        tensor.zero_()

    assert copies["w"].tolist() == [1, 1, 1]
    assert copies["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert all(copy.is_contiguous() for copy in copies.values())


def test_the_same_memory_is_used_again():
    staging = Staging()
    weight = torch.ones(3, requires_grad=True)

    first = staging.copy({"w": weight})["w"]
    place = first.data_ptr()
    second = staging.copy({"w": weight * 2})["w"]

    assert second.data_ptr() == place
    assert second.tolist() == [2, 2, 2]
    assert not second.requires_grad
    assert staging.copy({"w": torch.ones(5)})["w"].shape == (5,)


@pytest.mark.gpu
def test_a_copy_from_the_gpu_holds_the_work_queued_before_it_and_none_after():
    weight = torch.zeros(1 << 24, device="cuda")
    staging = Staging()
    for step in range(1, 4):
        for _ in range(50):
            weight += 1

        copy = staging.copy({"w": weight})["w"]
        weight.mul_(-1).mul_(-1).add_(0)

        assert copy.is_pinned()
        assert torch.equal(copy, torch.full_like(copy, 50.0 * step))
