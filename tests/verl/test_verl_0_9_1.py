"""The public package verl 0.9.1 on this library: its modules that use the queue are imported and driven as they are.

verl is not among the packages of the tests. These two commands make an environment for this file, and the third runs it:

    pip install -e '.[test]' 'torch==2.13.0' 'tensordict==0.10.0' 'transformers>=5.5.3,<5.11' accelerate aiohttp \\
        cachetools codetiming datasets dill fastapi hydra-core pandas peft pillow torchdata uvicorn
    pip install --no-deps 'verl==0.9.1'
    pytest -m slow tests/verl

What has no accelerator here is replaced on verl's side, see `standins`: the language model and its servers, and what the
training engines compute.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import transfer_queue as tq
from tests.verl import material

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed"),
    pytest.mark.filterwarnings("ignore"),  # those of verl and of what it imports
    pytest.mark.timeout(300),
]

GROUP = 2  # trajectories of a prompt


@pytest.fixture(scope="module")
def standins(ray_session: Any) -> Any:
    """The module, which Ray's workers get as a value: verl's wheel brings a package `tests` of its own."""
    from tests.verl import standins

    ray_session.cloudpickle.register_pickle_by_value(standins)
    return standins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("verl")
    material.write_model(made / "model")
    material.write_prompts(made / "train.jsonl", 60)
    material.write_prompts(made / "val.jsonl", 6)
    return made


@pytest.fixture
def run(standins: Any, folder: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Does what verl's `TaskRunnerV1.run` does, in this process: init, trainer, agents, fit, close."""
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ

    def fit(trainer_class: type, *overrides: str) -> Any:
        config = material.compose(folder, f"trainer.default_local_dir={tmp_path}/checkpoints", *overrides)
        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        tq.init(config.transfer_queue)
        trainer = trainer_class(config=config)
        trainer.init()
        agents = AgentLoopManagerTQ.create(
            config=config,
            llm_client=trainer.get_llm_client(),
            teacher_client=trainer.get_teacher_client(),
            reward_loop_worker_handles=trainer.get_reward_handles(),
        )
        try:
            trainer.fit(agents)
            trainer.left = tq.kv_list()
            prompts = [key for key, tag in trainer.left["train"].items() if tag.get("is_prompt")]
            trainer.left_prompts = standins.numbers(prompts) if prompts else []
        finally:
            trainer.end(agents)
            tq.close()
        return trainer

    yield fit
    tq.close()


@pytest.fixture
def queue(ray_session: Any) -> Iterator[Any]:
    """A queue from the section that verl ships, with the layout that it expects."""
    section = OmegaConf.load(str(files("verl") / "trainer" / "config" / "transfer_queue" / "transfer_queue.yaml"))
    section.backend.SimpleStorage.num_data_storage_units = 2
    yield tq.init(OmegaConf.merge(section, {"enable": True, "layout": "jagged", "runtime": "ray"}))
    tq.close()


def test_every_module_that_names_the_queue_imports() -> None:
    """Also those that name the module in front of it; all have this library, not verl's mock of a missing one."""
    root = Path(str(files("verl")))
    named = [
        path.relative_to(root.parent).with_suffix("")
        for path in root.rglob("*.py")
        if any(name in path.read_text() for name in ("import transfer_queue", "from transfer_queue", "utils.transferqueue"))
    ]
    modules = [importlib.import_module(".".join(path.parts)) for path in named]
    assert len(modules) >= 11
    found = [module for module in modules if hasattr(module, "tq")]
    assert {module.tq for module in found} == {tq}
    assert all(module.KVBatchMeta is tq.KVBatchMeta for module in modules if hasattr(module, "KVBatchMeta"))
    print(*sorted(module.__name__ for module in modules), sep="\n")


def test_the_synchronous_trainer(run: Any, standins: Any, tmp_path: Path) -> None:
    """Validation and two steps with critic and reference; rewards after sampling; a group that lacks a trajectory."""
    (tmp_path / "fail").write_text("2")
    trainer = run(
        standins.SyncTrainer,
        "trainer.v1.trainer_mode=sync",
        "algorithm.adv_estimator=gae",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=true",
    )
    assert trainer.drawn == [[0, 0, 1, 1, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7]]  # the first was padded to eight rows
    first, second = trainer.metrics
    assert first["critic/score/mean"] == pytest.approx((1 + 1 + 2 + 2 + 3 + 4 + 4) / 7)
    assert second["critic/score/mean"] == pytest.approx(6.5)
    assert (second["response_length/min"], second["response_length/max"]) == (5, 8)
    assert first["actor/rows"] == first["critic/rows"] == 8 / standins.RANKS
    assert trainer.validated["val-aux/num_turns/mean"] == 2
    assert trainer.left == {"val": {}, "train": {}}


def test_the_asynchronous_trainer_saves_and_resumes(run: Any, standins: Any, tmp_path: Path) -> None:
    """Prompts in flight at the checkpoint are started again by a new queue and new workers; one group fails as a whole.

    Over both runs each of the first 13 prompts is trained on once or still there, but for the one that failed.
    """
    settings = ("trainer.v1.trainer_mode=colocate_async", "algorithm.adv_estimator=grpo", "trainer.save_freq=1")
    (tmp_path / "fail").write_text("3")
    (tmp_path / "hold").write_text("6")  # answers to prompts 6 and up do not come before the first run ends
    before = run(standins.AsyncTrainer, *settings, "trainer.total_training_steps=1")
    statuses = [tag["status"] for tag in before.left["train"].values() if tag.get("is_prompt")]
    assert statuses.count("running") >= 2
    assert before.reissued == 0
    (tmp_path / "hold").unlink()
    after = run(standins.AsyncTrainer, *settings, "trainer.total_training_steps=2")
    assert after.reissued >= 2
    (drawn_before,), (drawn_after,) = before.drawn, after.drawn
    drawn = drawn_before + drawn_after
    assert len(drawn) == 2 * 4 * GROUP
    assert drawn[::GROUP] == drawn[1::GROUP]  # whole groups
    assert sorted(drawn[::GROUP] + after.left_prompts) == [0, 1, 2, *range(4, 13)]
    assert sum(run.metrics[0].get("training/rollout_failure/evicted_samples", 0) for run in (before, after)) == 1
