"""Scene columns in worker processes."""

from dagkit.evaluation import ColumnWork
from dagkit.judges.demo import DemoJudge
from scene_columns import JUDGE, scene_columns


def build() -> ColumnWork:
    return ColumnWork(scene_columns(), {JUDGE: DemoJudge.from_concept()})
