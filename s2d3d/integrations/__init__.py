"""The method in other trainers: Hugging Face, Lightning, accelerate. Import the module of the one that you use."""
