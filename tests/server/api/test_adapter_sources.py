"""LoRAX's further sources of adapters: S3, only where the operator allows it, and Predibase, by the caller's token."""

import httpx
import pytest
from adapter_world import AdapterWorld, refusal, world
from s3_stand_in import Bucket, running_s3
from scripted_engine import TestServer

__all__ = ["world"]


def objects(world: AdapterWorld, place: str) -> dict[str, bytes]:
    return {f"/{place}/{name}": content for name, content in world.files().items()}


async def ask(server: TestServer, adapter_id: str, source: str = "s3", token: str | None = None) -> httpx.Response:
    return await server.generate(adapter_id=adapter_id, adapter_source=source, api_token=token)


@pytest.mark.parametrize("adapter_id", ["s3://models/team/legal", "models/team/legal"])
def test_an_adapter_in_an_allowed_bucket_is_served(world: AdapterWorld, adapter_id: str) -> None:
    bucket = Bucket(objects(world, "models/team/legal"))

    async def test(server: TestServer) -> None:
        for _ in range(2):
            answer = await ask(server, adapter_id)
            assert answer.status_code == 200, answer.text
        [spec] = world.engine.adapters.values()
        assert spec.source == "s3"

    with running_s3(bucket) as access:
        world.serve(test, s3=access, adapter_bucket=("models",))
    assert sum(line.startswith("GET") for line, _ in bucket.asked) == 2


@pytest.mark.parametrize("allowed", [(), ("other",), ("models/team-b",), ("model",), ("models/team/leg",)])
def test_a_bucket_that_is_not_allowed_is_404_and_not_asked(world: AdapterWorld, allowed: tuple[str, ...]) -> None:
    bucket = Bucket(objects(world, "models/team/legal"))

    async def test(server: TestServer) -> None:
        answer = await ask(server, "models/team/legal")
        assert refusal(answer) == (404, "adapter_not_found") and "--adapter-bucket" in answer.text

    with running_s3(bucket) as access:
        world.serve(test, s3=access, adapter_bucket=allowed)
    assert bucket.asked == []


def test_a_folder_of_the_operators_is_where_names_without_a_bucket_lie(world: AdapterWorld) -> None:
    bucket = Bucket(objects(world, "models/adapters/legal"))

    async def test(server: TestServer) -> None:
        assert (await ask(server, "legal")).status_code == 200
        assert refusal(await ask(server, "nothing")) == (404, "adapter_not_found")
        assert refusal(await ask(server, "leg")) == (422, "validation")

    with running_s3(bucket) as access:
        world.serve(test, s3=access, s3_folder="models/adapters", adapter_bucket=("models",))


def test_s3_in_trouble_is_424(world: AdapterWorld) -> None:
    bucket = Bucket(objects(world, "models/legal"))
    bucket.status = 503

    async def test(server: TestServer) -> None:
        answer = await ask(server, "models/legal")
        assert refusal(answer) == (424, "adapter_unavailable") and answer.headers["retry-after"]

    with running_s3(bucket) as access:
        world.serve(test, s3=access, adapter_bucket=("models",))


def test_predibase_tells_the_place_to_the_holder_of_the_token_alone(world: AdapterWorld) -> None:
    bucket = Bucket(objects(world, "models/uuid/legal"))
    bucket.told["/v2/repos/legal/version/3"] = ("alices", {"adapterPath": "uuid/legal", "status": "completed"})
    bucket.told["/v2/repos/legal/version/4"] = ("alices", {"adapterPath": "uuid/legal", "status": "queued"})

    async def test(server: TestServer) -> None:
        before = (await ask(server, "legal/3", "pbase", "bobs")).json()
        assert before["error_type"] == "adapter_not_found"
        assert (await ask(server, "legal/3", "pbase", "alices")).status_code == 200
        assert (await ask(server, "legal/3", "pbase", "bobs")).json() == before
        assert refusal(await ask(server, "legal/3", "pbase")) == (403, "adapter_forbidden")
        queued = await ask(server, "legal/4", "pbase", "alices")
        assert refusal(queued) == (424, "adapter_unavailable")
        assert "not ready for use. Current status: queued" in queued.json()["error"]
        for place in ("models/uuid/legal", "uuid/legal"):  # nobody comes to it past the gateway
            assert refusal(await ask(server, place, "s3", "bobs")) == (404, "adapter_not_found")
        [request] = world.engine.requests[:1]
        assert request.cache_salt and request.adapter_id.startswith("private-")

    with running_s3(bucket) as access:
        world.serve(test, s3=access, s3_folder="models", predibase_gateway=access.endpoint)
