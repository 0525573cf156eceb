"""One model that classifies, holds up under perturbation, flags what is not like its data, and draws its classes.

Vocabulary, everywhere: image (N,3,H,W) float32 in [0,1]; label (N,) int64; logits (N,K); energy (N,) nats, lower =
likelier; joint_energy -f(x)[y]; score -dE/dx; eps and step_size in pixel units of [0,1]; p_value; suspicious; bundle;
engine; preset; run.
"""

__version__ = "0.1.0"
