"""All federations, in the order of the table."""

from . import (
    fair_adult,
    fair_synthetic,
    fedem_synthetic,
    federatedscope_synthetic,
    fedprox_mnist,
    fedprox_synthetic,
    femnist,
    niid_fashion,
    robust_femnist,
    scaffold_fashion,
    shakespeare,
    tcga_brca,
)

FEDERATIONS = [
    fedprox_synthetic.FEDERATION,
    fedprox_mnist.FEDERATION,
    federatedscope_synthetic.FEDERATION,
    fedem_synthetic.FEDERATION,
    tcga_brca.FEDERATION,
    fair_synthetic.FEDERATION,
    fair_adult.FEDERATION,
    scaffold_fashion.FEDERATION,
    robust_femnist.FEDERATION,
    femnist.FEDERATION,
    shakespeare.FEDERATION,
    niid_fashion.FEDERATION,
]
