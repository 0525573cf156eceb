"""From a bundle's weights to its graphs; never imports training."""
