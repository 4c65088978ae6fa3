"""Settings that make a run take seconds."""

SMALL = (
    *("data.batch_size=8", "data.window_rows=64", "data.val_rows=4", "data.check_token_rows=200"),
    *(
        "trainer.eval_every_steps=2",
        "callbacks.samples.num_prompts=1",
        "callbacks.samples.max_tokens=4",
    ),
    *("lora.rank=4", "lora.alpha=4"),
)
