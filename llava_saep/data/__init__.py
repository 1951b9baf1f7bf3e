"""From LLaVA's conversation files to batches: templates, labels, images, data set, collator, sampler."""
