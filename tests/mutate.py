# ruff: noqa: E501
"""Break the code in many places, one at a time, and see whether the tests notice.

python tests/mutate.py              # all of them, which takes some 20 minutes on two cores
python tests/mutate.py loader       # only those in files whose name contains that word

Each mutation is made in a copy of the repository, where the tests that ought to notice it are run. The same tests must
pass in a copy without it. A line is printed for each mutation, and the score at the end. A mutation that is not noticed
needs a new test, or a line with a reason in NOT_NOTICED.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES, RECIPE = "test_recipes.py", "test_recipe.py"
MUTATIONS = [  # file, text, what it becomes, tests that ought to notice, a -k expression for them
    # scripts: constants and flags without effect, or with another value than they say
    ("cifar10_r1.py", "flip=args.flip", "flip=True", RECIPES, "r1"),
    ("cifar10_r1.py", "momentum=MOMENTUM", "momentum=0.8", RECIPES, "r1"),
    ("cifar10_r1.py", "weight_decay=WEIGHT_DECAY", "weight_decay=0", RECIPES, "r1"),
    ("cifar10_r1.py", "nesterov=True", "nesterov=False", RECIPES, "r1"),
    ("cifar10_r1.py", "precision=PRECISION", 'precision="bf16"', RECIPES, "r1"),
    ("cifar10_r1.py", "lr=args.lr", "lr=LR", RECIPES, "r1"),
    ("cifar10_r2.py", "crop=crop", "crop=0", RECIPES, "r2"),
    ("cifar10_r2.py", 'EPOCHS["crop" if args.crop', 'EPOCHS["crop" if not args.crop', RECIPES, "r2"),
    ("cifar10_r2.py", "batch_size=BATCH_SIZE", "batch_size=128", RECIPES, "r2"),
    ("cifar10_r3.py", "MEAN, STD, flip", "MEAN, MEAN, flip", RECIPES, "r3"),
    ("cifar10_r3.py", "STD = (0.2023", "STD = (0.2470", RECIPES, "r3"),
    ("cifar10_r3.py", ", base=BASE", "", RECIPES, "r3"),
    ("cifar10_r4.py", "cutout=CUTOUT[args.stem]", "cutout=CUTOUT['cifar']", RECIPES, "r4"),
    ("cifar10_r4.py", "jitter=JITTER[args.stem]", "jitter=0", RECIPES, "r4"),
    ("cifar10_r4.py", "LABEL_SMOOTHING[args.stem]", "LABEL_SMOOTHING['imagenet']", RECIPES, "r4"),
    ("cifar10_r4.py", 'flip="alternating"', "flip=True", RECIPES, "r4"),
    ("cifar10_r4.py", "args.epochs, PEAK[args.stem]", "args.epochs, 0.5", RECIPES, "r4"),
    ("cifar10_r4.py", "BATCH_SIZE[args.stem]", "BATCH_SIZE['cifar']", RECIPES, "r4"),
    ("cifar10_r4.py", "LR[args.stem]", "LR['cifar']", RECIPES, "r4"),
    ("cifar10_r4.py", "stem=args.stem", 'stem="imagenet"', RECIPES, "r4"),
    ("cifar10_r4.py", "        scheduler.step()  #", "        #", "test_resume.py", "rate_given"),
    ("train_mobilenetv2.py", "        scheduler.step()  #", "        #", "test_resume.py", "killed and mobilenet"),
    ("cifar10_r2.py", "torch.manual_seed(args.seed)", "torch.manual_seed(0)", RECIPES, "r2"),
    ("cifar10_r5.py", "model.whiten(", "str(", RECIPES, "r5"),
    ("cifar10_r5.py", '"lr": head_rate * args.lr, ', "", RECIPES, "r5"),
    ("cifar10_r5.py", '"momentum": SGD_MOMENTUM', "", RECIPES, "r5"),
    ("cifar10_r5.py", "SixViews(model) if args.tta", "model if args.tta", "test_scripts.py", "views"),
    ("cifar10_r5.py", ", reflect=True", "", RECIPES, "r5"),
    ("cifar10_r5.py", ", cutout=cutout", "", RECIPES, "r5"),
    ("cifar10_r5.py", ", HEAD_RATE / channels", ", HEAD_RATE", RECIPES, "r5"),
    ("cifar10_r5.py", ", jitter=JITTER", "", RECIPES, "r5"),
    ("cifar10_r5.py", ", scheduler)  # stepped", ")  # stepped", RECIPES, "r5"),
    ("train_mobilenetv2.py", "crop=4", "crop=0", RECIPES, "mobilenet"),
    ("train_mobilenetv2.py", "cutout=CUTOUT", "cutout=0", RECIPES, "mobilenet"),
    ("train_mobilenetv2.py", "jitter=JITTER", "jitter=0", RECIPES, "mobilenet"),
    ("train_mobilenetv2.py", "train_step, scheduler)", "train_step)", RECIPES, "mobilenet"),
    # utils.py
    ("utils.py", '"seed": args.seed', '"seed": 0', RECIPES, "r1"),
    ("utils.py", "    loader.set_epoch(epoch)\n", "", RECIPES, "anew"),
    ("utils.py", "    torch.manual_seed(epoch_seed(loader.seed, epoch) + RANK)", "    ", RECIPES, "anew"),
    ("utils.py", " + RANK)", ")", RECIPES, "anew"),
    ("utils.py", "    model.eval()\n    with Meter", "    with Meter", RECIPES, "evaluation"),
    ("utils.py", "    model.eval()\n    own_logits", "    own_logits", RECIPES, "evaluation"),
    ("utils.py", "    train_step.model.train()\n", "    train_step.model.eval()\n", RECIPES, "anew"),
    ("utils.py", "TEST_BATCH_SIZE, **common", "TEST_BATCH_SIZE, **augmentation, **common", RECIPES, "r4"),
    ("utils.py", "classes * labels + logits.argmax(1)", "classes * logits.argmax(1) + labels", RECIPES, "confusion"),
    ("utils.py", "confusion.sum(1)", "confusion.sum(0)", "test_scripts.py", "record or synthetic"),
    ("utils.py", "step + 0.5", "step", RECIPES, "r4"),
    ("utils.py", "        data = data.hold_out()\n", "        pass\n", RECIPE, "holdout"),
    # loader
    ("harness/loader.py", "torch.randperm(n, generator=generator)", "torch.arange(n)", "test_data.py " + RECIPES, "anew"),
    ("harness/loader.py", "epoch_seed(self.seed, self.epoch)", "self.seed", "test_data.py", "epoch"),
    ("harness/loader.py", "torch.randint(2, (n,), generator=generator)", "torch.randint(2, (n,))", "test_data.py", "epoch"),
    ("harness/loader.py", "2 * self.crop + 1, (2, n)", "2 * self.crop, (2, n)", "test_data.py", "distribution"),
    ("harness/loader.py", "side * rows + columns", "side * columns + columns", "test_data.py", "flip"),
    ("harness/loader.py", "[order] != self.epoch % 2", " != self.epoch % 2", "test_data.py", "alternating"),
    ("harness/muon.py", "len(parameter) ** 0.5 / ", "", "test_muon.py", ""),
    ("harness/muon.py", "step = gradient.add(buffer", "step = parameter.grad.add(buffer", "test_muon.py", ""),
    ("harness/muon.py", "step = orthogonalize(step", "step = (step", "test_muon.py", ""),
    ("harness/drawing.py", "row: statistics.mean", "row: -statistics.mean", "test_plot.py", "dot"),
    ("harness/loader.py", "flip(2).flatten", "flip(1).flatten", "test_data.py", "flip"),
    ("harness/loader.py", ".sub_(self.shift).div_", ".div_", "test_data.py", "normalisation"),
    ("harness/loader.py", "images.add_(brightness)", "images.add_(contrast)", "test_data.py", "jitter"),
    ("harness/loader.py", "mul_(1 + contrast)", "mul_(1 + 2 * contrast)", "test_data.py", "jitter"),
    ("harness/loader.py", "- centre[:, None] + half", "- centre[:, None]", "test_data.py", "cutout"),
    ("harness/loader.py", "self.labels[order]", "self.labels[order.sort().values]", "test_data.py", "keeps"),
    ("harness/loader.py", "min(math.ceil(n / batch_size), n // 2)", "n // batch_size", "test_data.py", "differ"),
    ("harness/state.py", "RANK > 0 and states[name]", 'RANK > 0 and name == "model"', "test_torchrun.py", "alike"),
    ("harness/loader.py", "WORLD_SIZE * len(share) / size", "1", "test_torchrun.py", "recipe_is"),
    ("harness/loader.py", "images.narrow(dim, 1, padding)", "images.narrow(dim, 0, padding)", "test_data.py", "borders"),
    # training
    ("harness/training.py", "            self.scheduler.step()\n", "            pass\n", RECIPES, "stepped"),
    ("harness/operations.py", "weight[1:]", "weight", "test_muon.py", "operations"),
    ("harness/training.py", "        self.optimizer.zero_grad()\n", "", "test_scripts.py", "minute"),
    ("harness/training.py", "losses.isfinite().logical_not().nonzero()", "losses[:0]", "test_faults.py", "never_saved"),
    ("harness/training.py", "loss / seen, 100", "loss, 100", RECIPES, "mean_loss"),
    ("harness/state.py", "[lr * (rate / before) for", "[0.1 * (rate / before) for", "test_resume.py", "rate"),
    ("harness/state.py", "moments[name] = torch", "_ = torch", "test_resume.py", "moments"),
    ("harness/state.py", '        same &= checkpoint["par', '        checkpoint["par', RECIPE, "order"),
    # recipe, command line
    ("harness/recipe.py", "if was == now or", "if names[0] == 'flags' or was == now or", RECIPE, ""),
    ("harness/recipe.py", '"seed": args.seed', '"seed": 0', RECIPE + " test_scripts.py", "refuses or seed or recipe"),
    ("harness/command_line.py", "seed != 0", "False", "test_scripts.py " + RECIPE, "seeds or called"),
    ("harness/command_line.py", "if action.choices is not None", "if True", RECIPE, "called"),
    ("harness/command_line.py", 'else text.replace("-", "%2D")', "else text", RECIPE, "called"),
    ("harness/terminal.py", "        sys.stdout.flush()  # here", "        pass  # here", "test_bad_input.py", "at_the_end"),
    ("harness/command_line.py", "is_value = word in flags", "is_value = False", RECIPE, "resumes"),
    # checkpoints, folder, files, records
    ("harness/checkpoints.py", 'checkpoint.get("fingerprint") != self.network["fingerprint"]', "False", "test_recipe.py", "holdout"),
    ("harness/checkpoints.py", "is_best = row is self.records.best_row()", "is_best = True", "test_resume.py", "best"),
    ("harness/checkpoints.py", "            self.restore_best(checkpoint)\n", "", "test_resume.py", "best"),
    ("harness/checkpoints.py", "        self.run_folder.check()\n        check_is_plain(self.state.settings())  # again",
     "        check_is_plain(self.state.settings())  # again", "test_faults.py", "goes"),
    ("harness/checkpoints.py", "        check_is_plain(self.state.settings())  # again", "        #", "test_recipe.py", "costs_no_earlier"),
    ("harness/checkpoints.py", "        check_is_plain(self.network | self.state.settings())\n", "", "test_recipe.py", "does_not_begin"),
    ("harness/records.py", '["epochs"] == self.rows', '["epochs"]', "test_resume.py", "longer"),
    ("harness/checkpoints.py", "self.args.epochs + 1)", "self.args.epochs)", "test_scripts.py", "record"),
    ("harness/checkpoints.py", "epoch < recipe", "epoch > recipe", "test_resume.py", "r3"),
    ("harness/checkpoints.py", "if self.last_is_whole else None", "if False else None", "test_scripts.py", "damaged"),
    ("harness/folder.py", "        self.path.rename(earlier)\n", "        __import__('shutil').rmtree(self.path)\n",
     "test_scripts.py", "deletes"),
    ("harness/folder.py", "            lock.acquire(timeout=0)\n", "", "test_resume.py test_faults.py", "second or stopped"),
    ("harness/files.py", "damaged = file.testzip()", "damaged = None", "test_faults.py", "byte_changed_anywhere"),
    ("harness/files.py", "        os.replace(new, path)\n", "        shutil.copyfile(new, path)\n", "test_faults.py",
     "killed or full"),
    ("harness/files.py", "type(epoch) is not int or epoch < 1", "False", "test_faults.py", "members"),
    ("harness/records.py", 'key=lambda row: row["test_accuracy"]', 'key=lambda row: row["train_accuracy"]',
     RECIPES, "figures"),
    ("harness/records.py", 'sum(row["seconds"] for row in self.rows)', "0", "test_scripts.py", "record"),
    # data, download
    ("harness/data.py", "held_out[indices[last_of_ten::10]]", "held_out[indices[:5000]]", "test_data.py", "held"),
    ("harness/data.py", "if os.path.islink(link)", "if False", "test_bad_input.py", "mistakes"),
    ("harness/data.py", "        check_is_free(root)\n", "        pass\n", "test_bad_input.py", "mistakes"),
    ("harness/data.py", "if not check_integrity(folder / member, md5)", "if False", "test_data.py", "member"),
    ("harness/download.py", "if sha256_of(part) == sha256", "if True", "test_download.py", "other_bytes"),
    ("harness/download.py", 'f"bytes={have}-"', '"bytes=0-"', "test_download.py", "resumed"),
    ("harness/download.py", '"data_filter"', '"fully_trusted_filter"', "test_download.py", "hostile"),
    ("harness/download.py", "host = address.netloc.rp", "host = address.netloc.p", "test_download.py", "password"),
    ("reproduce.py", '("last.pt", "run.json")', '("last.pt",)', "test_reproduce.py", "deleted_run"),
    # mean_and_std, predict, plot, models
    ("mean_and_std.py", "(pixels - 1)).sqrt()", "pixels).sqrt()", "test_mean_and_std.py", "images"),
    ("mean_and_std.py", "parts = values.split(256, dim=2)", "parts = values.split(1024, dim=2)", "test_mean_and_std.py", "own"),
    ("predict.py", "images / 255", "images / 256", "test_predict.py", "normalises"),
    ("predict.py", "softmax(1)", "softmax(0)", "test_predict.py", ""),
    ("predict.py", "nn.Sequential(plain, ", "nn.Sequential(plain.network, ", "test_shipped.py", "exported"),
    ("predict.py", "Dim.DYNAMIC", "Dim.STATIC", "test_shipped.py", "exported"),
    ("harness/shipped.py", "path.read_bytes() == content", "True", "test_shipped.py", "is_shipped"),
    ("harness/shipped.py", "tensor.half()", "tensor", "test_shipped.py", "is_shipped"),
    ("harness/shipped.py", " and tensor.dim() > 1", "", "test_shipped.py", "is_shipped"),
    ("models/cpu_layers.py", " and not torch.compiler.is_compiling()", "", "test_shipped.py", "exported and ResNet18"),
    ("harness/drawing.py", "argsort(descending=True", "argsort(descending=False", "test_plot.py", "mistakes"),
    ("models/cpu_layers.py", "3 * rows[:, None, :, None]", "rows[:, None, :, None]", "test_models.py", "conv3x3"),
    ("models/cpu_layers.py", "zeros = 2 - padding[1]", "zeros = 1", "test_models.py", "conv3x3"),
    ("models/whitened_cnn.py", "1 - width % 2", "1", "test_models.py", "pool_uses"),
    ("models/whitened_cnn.py", "1 - x.shape[2] % 2", "1", "test_models.py", "pool_uses"),
    ("models/whitened_cnn.py", "(2, 3), 2", "2", "test_models.py", "mirror_images"),
    ("models/whitened_cnn.py", "[symmetric, second, first]", "[symmetric, first, second]", "test_models.py", "mirror_images"),
    ("models/whitened_cnn.py", ".flip(5)", ".flip(4)", "test_models.py", "mirror_images or whitened_cnn"),
    ("models/whitened_cnn.py", "moments + 1e-6 * mirror", "moments", "test_models.py", "mirror_images"),
    ("models/whitened_cnn.py", "        eigenvalues.clamp_(min=0)", "        #", "test_models.py", "white_images"),
    ("models/whitened_cnn.py", "unflatten(1, (2, -1))", "unflatten(1, (-1, 2))", "test_models.py", "mirror_images"),
    ("models/whitened_cnn.py", "super().__init__(channels // 2)", "super().__init__(channels)", "test_models.py", "mirror_images"),
    ("models/resnet.py", "stride=1, padding=1", "stride=2, padding=1", "test_models.py", ""),
    ("models/mobilenetv2.py", "[6, 24, 2, 1]", "[6, 24, 2, 2]", "test_models.py", ""),
    ("models/tutorial_cnn.py", "nn.Linear(120, 84), nn.ReLU()", "nn.Linear(120, 84)", "test_models.py", "tutorial"),
]  # fmt: skip
NOT_NOTICED = {}  # text: the reason why no test notices


def notices(file: str, text: str, instead: str, tests: str, expression: str) -> bool:
    """Return whether the tests fail in a copy of the repository with this mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        source = (copy / file).read_text()
        (copy / file).write_text(source.replace(text, instead))
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-k", expression]
        command = [sys.executable, "-m", "pytest", *options]
        command += [f"tests/{name}" for name in tests.split()]
        done = subprocess.run(command, cwd=copy, capture_output=True, timeout=1800)
        # 2: the mutation breaks an import. From 3 on, no test was selected.
        assert done.returncode in (0, 1, 2), done.stdout.decode()[-2000:]
        return done.returncode != 0


def main() -> None:
    chosen = [mutation for mutation in MUTATIONS if not sys.argv[1:] or sys.argv[1] in mutation[0]]
    if not chosen:
        sys.exit(f"no mutation is of a file with {sys.argv[1]} in its name")
    every_test = " ".join(sorted({name for *_, tests, _ in chosen for name in tests.split()}))
    if notices(*chosen[0][:2], chosen[0][1], every_test, ""):
        sys.exit("the tests fail before anything is broken")
    noticed = 0
    for file, text, instead, tests, expression in chosen:
        seen = notices(file, text, instead, tests, expression)
        noticed += seen
        verdict = "noticed    " if seen else "NOT NOTICED"
        reason = "" if seen else f"  ({NOT_NOTICED.get(text, 'write a test')})"
        print(f"{verdict} {file}: {text.strip()!r} -> {instead.strip()!r}{reason}", flush=True)
    print(f"{noticed} of {len(chosen)} noticed")


if __name__ == "__main__":
    main()
