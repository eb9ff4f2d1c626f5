"""User errors: each gets one line and exit status 2, and unusual but correct input works."""

import functools
import os
import signal
import subprocess
import sys

import utils

import pytest
from helpers import R1, R2, ROOT, SCRIPTS, png, write_images
from PIL import Image


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--epochs 0", "argument --epochs: '0' is not a whole number of 1 or more"),
        ("--device cuda:99", "--device cuda:99: this machine"),
        ("--device cuda:200", "--device cuda:200: this machine"),
        ("--device gpu", "--device 'gpu' is not one of"),
    ],
)
def test_mistakes_on_the_command_line(refused, flags, words):
    assert words in refused(R1, *flags.split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_mistakes_in_every_script(refused, name):
    assert "--precision fp16 needs CUDA" in refused(name, "--device", "cpu", "--precision", "fp16")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Return a folder with folders of data, most of them with something wrong."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("good", "text", "cut", "bomb", "large", "empty", "sixteen", "sixteen ppm", "sixteen sgi"):
        write_images(root / name, train=4, test=2)
    first = "train/cat/0000.png"
    (root / "text" / first).write_text("no picture")
    (root / "cut" / first).write_bytes((root / "good" / first).read_bytes()[:200])
    (root / "bomb" / first).write_bytes(png(2, 3, bits=8, side=20_000))
    Image.new("RGB", (33, 32)).save(root / "large" / first)
    Image.new("I;16", (32, 32)).save(root / "sixteen" / first)
    (root / "sixteen ppm" / first).write_bytes(b"P6 32 32 65535\n" + bytes(32 * 32 * 3 * 2))
    Image.new("RGB", (32, 32)).save(root / "sixteen sgi" / first, format="SGI", bpc=2)
    for name, colour_type, channels in (("sixteen colours", 2, 3), ("sixteen alpha", 4, 2)):
        write_images(root / name, train=4, test=2)
        (root / name / first).write_bytes(png(colour_type, channels))
    for path in (root / "empty/test/dog").iterdir():
        path.unlink()
    write_images(root / "one class", classes=("cat",))
    write_images(root / "differ", train=2, test=2)
    (root / "differ/test/frog").rename(root / "differ/test/fish")
    (root / "no test/train").mkdir(parents=True)
    write_images(root / "names", classes=("a class with spaces", "ümläut", "猫"), train=4, test=2)
    (root / "file").write_text("")
    write_images(root / "single", train=1, test=2)
    write_images(root / "capitals", train=1, test=1)
    for split in ("train", "test"):
        (root / "capitals" / split).rename(root / "capitals" / split.capitalize())
    for name, target in (("self", "."), ("up", "..")):
        write_images(root / name, train=2, test=2)
        (root / name / "train/cat" / name).symlink_to(target)
    write_images(root / "broken", train=2, test=2)
    (root / "broken/train/cat/x.png").symlink_to("gone.png")
    write_images(root / "fifo", train=2, test=2)
    os.mkfifo(root / "fifo/train/cat/x.png")
    (root / "archive").mkdir()
    (root / "archive/cifar-10-python.tar.gz").write_text("<html>")
    (root / "batches/cifar-10-batches-py").mkdir(parents=True)
    for name in ("film.mpg", "features.h5", "notes.txt"):
        (root / "good/train/cat" / name).touch()  # nothing that Pillow reads
    return root


@pytest.mark.parametrize(
    "command, words",
    [
        ("cifar10_r1.py --data {}/text", "train/cat/0000.png is not a readable image"),
        ("cifar10_r1.py --data {}/cut", "train/cat/0000.png is not a readable image"),
        ("cifar10_r1.py --data {}/bomb", "train/cat/0000.png is "),
        ("cifar10_r1.py --data {}/large", "train/cat/0000.png is 33x32, not 32x32"),
        ("cifar10_r1.py --data {}/sixteen", "train/cat/0000.png has more than 8 bits"),
        ("cifar10_r1.py --data {}/sixteen colours", "train/cat/0000.png has more than 8 bits"),
        ("cifar10_r1.py --data {}/sixteen alpha", "train/cat/0000.png has more than 8 bits"),
        ("cifar10_r1.py --data {}/sixteen ppm", "train/cat/0000.png has more than 8 bits"),
        ("cifar10_r1.py --data {}/sixteen sgi", "train/cat/0000.png has more than 8 bits"),
        ("cifar10_r1.py --data {}/empty", "test/dog holds no image"),
        ("cifar10_r1.py --data {}/one class", "holds 1 class folder; a classifier needs two or more"),
        ("cifar10_r1.py --data {}/differ", "has no counterpart in"),
        ("cifar10_r1.py --data {}/no test", "no test/test is missing"),
        ("cifar10_r1.py --data {}/file", "file is a file; name the folder it is in"),
        ("cifar10_r1.py --data {}/archive", "is damaged or not CIFAR-10 (wrong SHA-256)"),
        ("cifar10_r1.py --data {}/batches", "data_batch_1 is missing or damaged"),
        ("cifar10_r1.py --data {}/file/below", "Not a directory"),
        ("cifar10_r1.py --data {}/good --checkpoints {}/file", "file/cifar10_r1 cannot be written: "),
        ("cifar10_r1.py --data {}/good --evaluate {}/good", "good cannot be read: Is a directory"),
        ("cifar10_r1.py --data {}/good --evaluate {}/file", "file is damaged or not a checkpoint"),
        ("cifar10_r1.py --data {}/good --resume nothing.pt", "nothing.pt cannot be read: No such file"),
        ("cifar10_r1.py --data {}/good --evaluate", "last.pt to evaluate; train this run first, or name a file"),
        ("cifar10_r1.py --crop", "unrecognized arguments: --crop"),
        ("cifar10_r2.py --flip", "unrecognized arguments: --flip"),
        ("cifar10_r2.py --data {}/good --batch-size 1", "--batch-size 1: batch-norm cannot train on a single image"),
        ("cifar10_r3.py --crop", "unrecognized arguments: --crop"),
        ("cifar10_r3.py --data {}/good", "run python cifar10_r2.py --crop"),
        ("cifar10_r4.py --stem huge", "argument --stem: invalid choice: 'huge'"),
        ("train_mobilenetv2.py --stem cifar", "unrecognized arguments: --stem cifar"),
        ("mean_and_std.py --data {}/text", "train/cat/0000.png is not a readable image"),
        ("mean_and_std.py --plot", "argument --plot: expected one argument"),
        ("download.py --data {}/file", "is a file; name the folder"),
        ("cifar10_r1.py --data {}/good/train", "train holds cat, dog, frog, but no cifar-10-python.tar.gz, no cifar"),
        ("cifar10_r1.py --data {}/capitals", "capitals holds Test, Train, but no cifar-10-python.tar.gz"),
        ("download.py --data {}/capitals", "name a folder that holds one of these, or a new one to download CIFAR-10"),
        ("cifar10_r1.py --data {}/self", "cat/self is a link to a folder; replace it with its images, or remove it"),
        ("cifar10_r1.py --data {}/up", "cat/up is a link to a folder; replace it with its images, or remove it"),
        ("cifar10_r1.py --data {}/fifo", "train/cat/x.png is not a file; remove it"),
        ("cifar10_r1.py --data {}/broken", "train/cat/x.png is a link to a file that is gone; remove it"),
        ("cifar10_r1.py --data {}/single --holdout", "--holdout: the class cat has 1 training image; it needs two"),
        ("download.py --data synthetic", "--data synthetic needs no download"),
    ],
)
def test_mistakes(refused, tmp_path, odd, command, words):
    name, *flags = command.split(" --")
    flags = [part.format(odd, odd) for flag in flags for part in f"--{flag}".split(" ", 1)]
    assert words in refused(name, *flags)
    assert not (tmp_path / "checkpoints").exists()


def test_what_is_no_mistake(script, tmp_path, odd):
    names = ["--data", odd / "names", "--epochs", 1]
    done = script(R1, *names)
    assert "Accuracy of ümläut: " in done.stdout and not done.stderr
    assert "Accuracy of a class with spaces: " in script(R1, *names, "--batch-size", 10_000).stdout
    assert not script(R1, *names, "--batch-size", 1, "--lr", "1e-9", "--seed", 2**63 - 1).stderr
    out = script(R1, *names, "--checkpoints", tmp_path / "a folder" / "ümläut").stdout
    assert "ümläut/cifar10_r1\n" in out and (tmp_path / "a folder/ümläut/cifar10_r1/run.json").exists()
    assert "on cpu in bf16\n" in script(R2, *names, "--precision", "bf16", "--device", "cpu").stdout


def run(command, folder, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    environment.pop("PYTHONUNBUFFERED", None)  # Python's own buffer fails in its own way
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, timeout=300)


def test_a_locale_without_utf8(tmp_path, odd):
    command = f"{sys.executable} {ROOT / R1} --data {odd / 'names'} --epochs 1"
    done = run(command, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and b"Accuracy of \\udcc3\\udcbcml" in done.stdout, done.stderr
    code = "import reproduce, harness.pages; harness.pages.filled_pages(reproduce.ROWS, reproduce.read_records())"
    done = run(f"{sys.executable} -c '{code}'", tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away(tmp_path, odd):
    command = f"{sys.executable} {ROOT / R1} --data {odd / 'good'} --epochs 300 | head -1"
    done = run(command, tmp_path)
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b"cifar10_r1.py: error: the program that read the output has ended\n"
    assert (tmp_path / "checkpoints/cifar10_r1/last.pt").exists()


@pytest.mark.parametrize(
    "where, words",
    [("| true", "the program that read the output has ended"), ("> /dev/full", "No space left on device")],
)
def test_an_output_that_fails_at_the_end(tmp_path, where, words):
    """mean_and_std.py prints so little that Python keeps it until the command ends."""
    done = run(f"{{ {sys.executable} {ROOT / 'mean_and_std.py'} --data synthetic; echo $? >&2; }} {where}", tmp_path)
    line, status = done.stderr.decode().splitlines()
    assert line.startswith("mean_and_std.py: error: ") and line.endswith(words) and status == "2"


def test_a_second_ctrl_c_disturbs_nothing(tmp_path):
    """It comes while the first one's line is printed."""
    (tmp_path / "x.py").write_text(
        "import io, os, signal, sys\nfrom harness.terminal import run\n"
        "class Output(io.StringIO):\n    def flush(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.stdout = Output()\nrun(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    )
    done = run(f"{sys.executable} x.py", tmp_path)
    assert (done.returncode, done.stderr) == (130, b"x.py: ended by SIGINT\n")


def test_an_output_of_another_kind(tmp_path):
    """IDLE and notebooks replace sys.stdout by an object of their own."""
    code = "import io, sys; sys.stdout = io.StringIO(); from harness.terminal import run; run(lambda: print(1))"
    done = run(f"{sys.executable} -c '{code}'", tmp_path)
    assert done.returncode == 0 and not done.stderr


def test_a_closed_output(tmp_path, odd):
    for closed in (">&-", ">&- 2>&-"):
        done = run(f"{sys.executable} {ROOT / R1} --data {odd / 'good'} --epochs 1 {closed}", tmp_path)
        assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "checkpoints/cifar10_r1/run.json").exists()


@pytest.mark.parametrize("name", [R1, "predict.py", "plot.py", "mean_and_std.py", "reproduce.py", "download.py"])
def test_ctrl_c_while_pytorch_is_imported(name):
    """The script prints one line and has the exit status that Ctrl-C has in a shell.

    The handler is set because a shell script's background jobs, and so their tests, ignore Ctrl-C.
    """
    code = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, module, *_):
        if module == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["{name}"]
runpy.run_path("{ROOT / name}", run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and process.stderr == f"{name}: ended by SIGINT\n"


def test_a_program_that_imports_predict_keeps_its_own_hook(tmp_path):
    code = f"import sys; hook = sys.excepthook; sys.path.insert(0, {str(ROOT)!r}); import predict; "
    subprocess.run([sys.executable, "-c", code + "assert sys.excepthook is hook"], cwd=tmp_path, check=True)


def failing(error):
    """Make the next use of a device fail in this way."""

    def fail(name):
        raise error

    utils.choose_device = fail


@pytest.mark.parametrize(
    "error, words",
    [
        (
            RuntimeError("CUDA error: no kernel image is available for execution"),
            "does not support this GPU; use --dev",
        ),
        (
            RuntimeError("CUDA out of memory."),
            "out of memory on the GPU; use --device cpu, or train with a smaller --b",
        ),
        (MemoryError(), "out of memory on this machine; free some memory, or train with a smaller --b"),
    ],
    ids=["no kernel image", "GPU memory", "memory"],
)
def test_what_a_device_lacks_is_one_line(refused, error, words):
    assert words in refused(R1, "--data", "synthetic", before=functools.partial(failing, error))


def test_a_percent_sign_in_a_scripts_help(capsys):
    parser = utils.ArgumentParser("", epochs=1, batch_size=1, lr=1)
    parser.add_argument("--drop", help="drop 10 % of the images (default: %(default)s)")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "drop 10 % of the images" in capsys.readouterr().out


def test_a_class_with_a_newline_and_a_picture_of_169_megapixels(script, tmp_path):
    folder = write_images(tmp_path / "odd", classes=("a\nb", "c"), train=4, test=2)
    assert "\nAccuracy of a\\nb: " in script(R1, "--data", folder, "--epochs", 1).stdout
    Image.new("L", (13_000, 13_000)).save(tmp_path / "large.png")
    done = script("predict.py", "large.png", "--checkpoint", "checkpoints/cifar10_r1/best.pt", "--plot", "drawn.png")
    assert "large.png: " in done.stdout and not done.stderr


def test_a_runs_folder_that_is_a_link(script, tmp_path, odd):
    flags = [R1, "--data", odd / "good", "--epochs", 1]
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/cifar10_r1").symlink_to(tmp_path / "gone")
    assert "is now in checkpoints/cifar10_r1.earlier1\n" in script(*flags).stdout
    (tmp_path / "checkpoints/cifar10_r1").rename(tmp_path / "disk/run")
    (tmp_path / "checkpoints/cifar10_r1").symlink_to(tmp_path / "disk/run")
    assert "after epoch 1, which was the last\n" in script(*flags, "--resume").stdout
    script(*flags[:-1], 2, "--resume")
    assert "is now in checkpoints/cifar10_r1.earlier2\n" in script(*flags).stdout
    assert (tmp_path / "checkpoints/cifar10_r1.earlier2/last.pt").exists()
