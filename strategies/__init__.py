"""The methods: one file each, readable top to bottom against its paper; the regularisers that some are made of lie with them."""

from clstream.strategies.active import Active
from clstream.strategies.agem import AGEM, AGEMR
from clstream.strategies.aper import APER
from clstream.strategies.aser import ASER
from clstream.strategies.avalanche import AvalancheStrategy
from clstream.strategies.bic import BiC
from clstream.strategies.brain_inspired_replay import BIR
from clstream.strategies.class_means import ClassMeans
from clstream.strategies.cls_er import CLSER
from clstream.strategies.coact import CoACT
from clstream.strategies.coda_prompt import CODAPrompt
from clstream.strategies.continual_backprop import ContinualBackprop
from clstream.strategies.cope import CoPE
from clstream.strategies.core_sets import CoreSets
from clstream.strategies.cpe_clip import CPECLIP, CPEVision
from clstream.strategies.der import DER, DERpp
from clstream.strategies.dgr import DGR
from clstream.strategies.dualprompt import DualPrompt
from clstream.strategies.dynamic_er import DynamicER
from clstream.strategies.er_ace import ERACE
from clstream.strategies.ewc import EWC
from clstream.strategies.ewc import EWCPenalty as EWCPenalty
from clstream.strategies.expert_gate import ExpertGate
from clstream.strategies.fdr import FDR
from clstream.strategies.featkd import FeatKDPenalty as FeatKDPenalty
from clstream.strategies.fecam import FeCAM
from clstream.strategies.federated import Federated
from clstream.strategies.finetune import Finetune
from clstream.strategies.fscil import FSCIL
from clstream.strategies.gdumb import GDumb
from clstream.strategies.gem import GEM
from clstream.strategies.gpm import GPM
from clstream.strategies.gss import GSS
from clstream.strategies.hat import HAT
from clstream.strategies.hypernetwork import Hypernetwork
from clstream.strategies.icarl import ICaRL
from clstream.strategies.joint import Joint
from clstream.strategies.l2 import L2
from clstream.strategies.l2 import L2Penalty as L2Penalty
from clstream.strategies.l2_init import L2Init
from clstream.strategies.l2_init import L2InitPenalty as L2InitPenalty
from clstream.strategies.l2p import L2P
from clstream.strategies.lifelong import Lifelong
from clstream.strategies.linear_probe import LinearProbe
from clstream.strategies.lucir import LUCIR
from clstream.strategies.lwf import LwF
from clstream.strategies.lwf_mc import LwFMC
from clstream.strategies.mas import MAS
from clstream.strategies.mas import MASPenalty as MASPenalty
from clstream.strategies.mer import MER
from clstream.strategies.multilane import MultiLane
from clstream.strategies.ncm import NCM
from clstream.strategies.nevis import DynamicKNN, FrozenLinear, Independent, Previous
from clstream.strategies.openvae import OpenVAE
from clstream.strategies.owm import OWM
from clstream.strategies.packnet import PackNet
from clstream.strategies.pnn import PNN
from clstream.strategies.podnet import PODNet
from clstream.strategies.prd import PRD
from clstream.strategies.protonet import EpisodicTraining, ProtoNet
from clstream.strategies.ranpac import RanPAC
from clstream.strategies.redo import ReDo
from clstream.strategies.refresh import Refresh
from clstream.strategies.regularised import Regularised
from clstream.strategies.replay import Replay
from clstream.strategies.rwalk import RWalk
from clstream.strategies.rwalk import RWalkPenalty as RWalkPenalty
from clstream.strategies.scr import SCR
from clstream.strategies.sharp import SHARP
from clstream.strategies.shrink_and_perturb import ShrinkAndPerturb
from clstream.strategies.si import SI
from clstream.strategies.si import SIPenalty as SIPenalty
from clstream.strategies.simclr import SimCLR
from clstream.strategies.slda import SLDA
from clstream.strategies.support_replay import SupportReplay
from clstream.strategies.tame import TAME
from clstream.strategies.wa import WA
from clstream.strategies.with_detected_boundaries import WithDetectedBoundaries
from clstream.strategies.xder import XDER

__all__ = [
    "AGEM",
    "AGEMR",
    "APER",
    "ASER",
    "Active",
    "AvalancheStrategy",
    "BIR",
    "BiC",
    "CLSER",
    "CODAPrompt",
    "CPECLIP",
    "CPEVision",
    "ClassMeans",
    "CoACT",
    "CoPE",
    "ContinualBackprop",
    "CoreSets",
    "DER",
    "DERpp",
    "DGR",
    "DualPrompt",
    "DynamicER",
    "DynamicKNN",
    "ERACE",
    "EWC",
    "EpisodicTraining",
    "ExpertGate",
    "FDR",
    "FSCIL",
    "FeCAM",
    "Federated",
    "Finetune",
    "FrozenLinear",
    "GDumb",
    "GEM",
    "GPM",
    "GSS",
    "HAT",
    "Hypernetwork",
    "ICaRL",
    "Independent",
    "Joint",
    "L2",
    "L2Init",
    "L2P",
    "LUCIR",
    "Lifelong",
    "LinearProbe",
    "LwF",
    "LwFMC",
    "MAS",
    "MER",
    "MultiLane",
    "NCM",
    "OWM",
    "OpenVAE",
    "PNN",
    "PODNet",
    "PRD",
    "PackNet",
    "Previous",
    "ProtoNet",
    "RWalk",
    "RanPAC",
    "ReDo",
    "Refresh",
    "Regularised",
    "Replay",
    "SCR",
    "SHARP",
    "SI",
    "SLDA",
    "ShrinkAndPerturb",
    "SimCLR",
    "SupportReplay",
    "TAME",
    "WA",
    "WithDetectedBoundaries",
    "XDER",
]
