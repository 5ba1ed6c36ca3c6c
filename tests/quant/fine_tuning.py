"""Fine-tuning of small networks as the tests of quantization call it."""

from dataclasses import fields

from quant_networks import small_images

from quant import FineTuningOptions, QuantizationAware
from training import TrainingOptions, TrainingState, train_epochs

STEPS = 4


def batches(epoch, samples=0):
    """Images and regression targets that depend on the epoch."""
    for step in range(samples // 4, STEPS):
        images = small_images(4, seed=100 * epoch + step)
        yield images, images.mean(1, keepdim=True)[:, :, ::2, ::2].repeat(1, 4, 1, 1)


def squared_error(raw, targets, size):
    return {"error": (raw - targets).square().mean()}


def new_state(model, teacher=None, **options):
    """A model about to be fine-tuned; options of both kinds by name."""
    names = {field.name for field in fields(TrainingOptions)}
    training = {"epochs": 3, "learning_rate": 1e-3, "warmup_fraction": 0.0} | {
        name: value for name, value in options.items() if name in names
    }
    added = {name: value for name, value in options.items() if name not in names}
    extension = QuantizationAware(model, FineTuningOptions(**added), teacher)
    return TrainingState(model, TrainingOptions(**training), extension)


def fine_tune(model, teacher=None, data=batches, loss=squared_error, **options):
    """Fine-tune to the end; the last state."""
    state = new_state(model, teacher, **options)
    *_, state = train_epochs(state, data, STEPS, loss)
    return state
