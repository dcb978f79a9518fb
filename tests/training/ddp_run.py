"""One process of a distributed run, for test_ddp.py: torchrun ... ddp_run.py FOLDER [break]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from runs import make_driver, make_run, settings
from toy import ToyTask

folder = Path(sys.argv[1])
run = make_run(folder / "run", ToyTask(linear_loss=True), settings())
driver = make_driver(run, folder / "cache")
if (
    "break" in sys.argv
):  # another seed on the second process: other gradients would be averaged, but not another criterion
    make = driver.plan.make_pruner
    rank = run.accelerator.process_index
    object.__setattr__(driver.plan, "make_pruner", lambda model, **kw: make(model, criterion="random", seed=rank))
driver.execute()
