import pytest

from loraplex_server.engine.block_manager import BlockManager, hash_block, root_hash

SIZE = 4


def chain(token_ids: list[int], adapter_digest: str | None = None) -> list[bytes]:
    hashes, parent = [], root_hash(adapter_digest)
    for start in range(0, len(token_ids) - SIZE + 1, SIZE):
        parent = hash_block(parent, token_ids[start : start + SIZE])
        hashes.append(parent)
    return hashes


def computed(manager: BlockManager, hashes: list[bytes]) -> list[int]:
    block_ids = manager.allocate(len(hashes))
    for block_hash, block_id in zip(hashes, block_ids, strict=True):
        manager.commit(block_hash, block_id)
    return block_ids


def test_a_known_head_is_found_block_by_block():
    manager = BlockManager(8, SIZE)
    hashes = chain(list(range(12)))
    block_ids = computed(manager, hashes)
    assert manager.match_prefix(hashes) == block_ids
    assert manager.match_prefix(hashes[:2] + chain([9] * 4)) == block_ids[:2]


def test_the_same_tokens_under_another_adapter_are_another_block():
    tokens = list(range(8))
    names = {chain(tokens, digest)[-1] for digest in (None, "a", "b")}
    assert len(names) == 3
    manager = BlockManager(8, SIZE)
    computed(manager, chain(tokens, "a"))
    assert manager.match_prefix(chain(tokens, "b")) == []
    assert manager.match_prefix(chain(tokens)) == []


def test_a_block_hash_covers_all_that_stands_before_it():
    assert chain([1, 2, 3, 4, 5, 6, 7, 8])[1] != chain([0, 2, 3, 4, 5, 6, 7, 8])[1]


def test_a_freed_block_can_be_found_until_it_is_evicted():
    manager = BlockManager(2, SIZE)
    hashes = chain(list(range(8)))
    block_ids = computed(manager, hashes)
    manager.free(block_ids)
    assert manager.num_used == 0
    assert manager.match_prefix(hashes) == block_ids
    manager.free(block_ids)
    manager.allocate(2)
    assert manager.match_prefix(hashes) == []
    manager.check_integrity()


def test_blank_blocks_go_before_cached_ones_and_a_tail_before_its_head():
    manager = BlockManager(4, SIZE)
    hashes = chain(list(range(12)))
    block_ids = computed(manager, hashes)
    manager.free(block_ids)
    manager.allocate(1)  # the blank one
    assert manager.match_prefix(hashes) == block_ids
    manager.free(block_ids)
    manager.allocate(1)  # the oldest cached one: the tail
    assert manager.match_prefix(hashes) == block_ids[:2]
    manager.check_integrity()


def test_a_shared_block_is_free_only_when_all_have_given_it_back():
    manager = BlockManager(4, SIZE)
    hashes = chain(list(range(4)))
    block_ids = computed(manager, hashes)
    assert manager.match_prefix(hashes) == block_ids
    manager.free(block_ids)
    assert manager.num_used == 1
    manager.free(block_ids)
    assert manager.num_used == 0
    with pytest.raises(AssertionError, match="twice"):
        manager.free(block_ids)


def test_the_second_block_with_the_same_content_stays_private():
    manager = BlockManager(4, SIZE)
    hashes = chain(list(range(4)))
    first, second = computed(manager, hashes), computed(manager, hashes)
    assert manager.match_prefix(hashes) == first
    manager.free(second)
    manager.check_integrity()


def test_without_prefix_caching_nothing_is_found():
    manager = BlockManager(4, SIZE, prefix_caching=False)
    hashes = chain(list(range(4)))
    computed(manager, hashes)
    assert manager.match_prefix(hashes) == []
