"""Tinker's first program: ``python recipes/pig_latin.py``, in this process; ``--server`` runs it by the public SDK (`lorakit serve`).

On the tiny model its last loss was 0.0001 after 60 steps, and it answers " ubber-ray uck-day" four times (13 s on two cores).
"""
import sys
if "--server" in sys.argv: import tinker; sys.modules["lorakit"] = tinker
import numpy as np, lorakit
from lorakit import types
EXAMPLES = [("banana split", "anana-bay plit-say"), ("quantum physics", "uantum-qay ysics-phay"), ("donut shop", "onut-day op-shay"),
            ("pickle jar", "ickle-pay ar-jay"), ("space exploration", "ace-spay exploration-way"), ("rubber duck", "ubber-ray uck-day"),
            ("coding wizard", "oding-cay izard-way")]                      # memorised, whatever rule they follow
service = lorakit.ServiceClient()
training = service.create_lora_training_client(base_model="tiny", rank=32)
tokenizer = training.get_tokenizer()
def example(english, pig_latin):
    prompt = tokenizer.encode(f"English: {english}\nPig Latin:", add_special_tokens=True)
    completion = tokenizer.encode(f" {pig_latin}\n\n", add_special_tokens=False)
    tokens, weights = prompt + completion, [0] * len(prompt) + [1] * len(completion)
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]),
                       loss_fn_inputs=dict(target_tokens=tokens[1:], weights=weights[1:]))
data = [example(*pair) for pair in EXAMPLES]
weights = np.concatenate([d.loss_fn_inputs["weights"].tolist() for d in data])
for step in range(60):
    forward_backward = training.forward_backward(data, "cross_entropy")
    optim = training.optim_step(types.AdamParams(learning_rate=5e-3))
    result = forward_backward.result(); optim.result()
    logprobs = np.concatenate([output["logprobs"].tolist() for output in result.loss_fn_outputs])
    print(f"step {step}: loss {-np.dot(logprobs, weights) / weights.sum():.4f}")
sampling = training.save_weights_and_get_sampling_client(name="pig-latin-model")
prompt = types.ModelInput.from_ints(tokenizer.encode("English: rubber duck\nPig Latin:"))
samples = sampling.sample(prompt=prompt, num_samples=4, sampling_params=types.SamplingParams(max_tokens=20, temperature=0.0, stop=["\n"])).result()
for sequence in samples.sequences: print(tokenizer.decode(sequence.tokens))
