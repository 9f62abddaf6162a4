"""EdgeLoRA: fine-tune on the laptop you have, ship to the device they have."""

__version__ = "0.1.0"
