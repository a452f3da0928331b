"""What a bundle says about itself: `ff-export inspect` and the model card. Runs nothing."""
