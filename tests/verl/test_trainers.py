"""Trainers of verl 0.9.1, whole: agent loops, replay buffer, padding, dispatch to ranks, advantages, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import transfer_queue as tq
from tests.verl import environment, material

pytestmark = environment.NEEDS_VERL

GROUP = 2  # trajectories of a prompt


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
    from verl.utils import transferqueue_utils

    def fit(trainer_class: type, *overrides: str) -> Any:
        config = material.compose(folder, f"trainer.default_local_dir={tmp_path}/checkpoints", *overrides)
        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        transferqueue_utils.TQ_INITIALIZED = False  # as in a new process
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
