"""The whole protocol: one frozen type per message.

Three parties speak. A *client* asks the controller (`ControllerRequest`) and the storage units
(`UnitRequest`); a *unit* announces itself to the controller and settles blocks with it; the
*controller* pushes `FreeBlocks` to units. Every request gets exactly one answer, its reply type or
an `ErrorReply`; types marked "one-way" get none.

Shapes: n rows of a request, B rows of a draw. Arrays are int64 and travel as raw buffers. Fields of
type `Frames` travel out of band, as further frames of the message.

A row is named by (global index, generation). Generation `ANY_GENERATION` means "whichever lives now";
only handles written by hand carry it.

A block id is `unit number << 48 | span number << 16 | position in the span`; 0 means "no block".
"""

from __future__ import annotations

from typing import Any, TypeAlias

from transfer_queue.messages import journal as journal  # declares types that are stored and never sent
from transfer_queue.messages.base import (
    ANY_GENERATION,
    MESSAGE_TYPES,
    PROTOCOL_VERSION,
    SPAN_SHIFT,
    UNIT_SHIFT,
    Frames,
    Int64s,
    int64s_of,
    message,
)
from transfer_queue.messages.controller import (
    AbortGroup,
    Ack,
    AckMany,
    Admit,
    Announce,
    Cancel,
    Clear,
    Cut,
    Draw,
    Drop,
    EndCut,
    FreeBlocks,
    FreesDone,
    GetAdmission,
    GetAudit,
    GetExplanation,
    GetStatus,
    KeepCut,
    ListPartitions,
    ListUnits,
    Locate,
    Put,
    Reconcile,
    RegisterSampler,
    Release,
    Renew,
    ResetConsumption,
    Restore,
    SealGroup,
    SetTags,
    Settle,
    SetVersion,
    Withdraw,
)
from transfer_queue.messages.keys import GetKeys, Keys, WaitKeys
from transfer_queue.messages.replies import (
    Acked,
    Admitted,
    Announced,
    BlockBytes,
    CutDone,
    Done,
    Drawn,
    ErrorReply,
    Fetched,
    Leased,
    Names,
    Pinned,
    PutDone,
    Reconciled,
    Report,
    Reserved,
    Settled,
    Status,
    Units,
)
from transfer_queue.messages.unit import (
    AbortBlocks,
    Fetch,
    GetUnitStats,
    Introduce,
    Pin,
    ReadBlock,
    Reserve,
    ReturnSpan,
    StillHeld,
    Unpin,
    Write,
)
from transfer_queue.messages.values import (
    ColumnSpec,
    Location,
    ProcessId,
    UnitInfo,
)

ControllerRequest: TypeAlias = (
    Put
    | Draw
    | Locate
    | SetTags
    | Clear
    | ResetConsumption
    | SealGroup
    | AbortGroup
    | GetStatus
    | GetAudit
    | GetExplanation
    | RegisterSampler
    | ListPartitions
    | ListUnits
    | Cancel
    | Announce
    | FreesDone
    | Settle
    | Reconcile
    | Ack
    | AckMany
    | Release
    | Renew
    | Drop
    | Admit
    | Cut
    | EndCut
    | KeepCut
    | Restore
    | Withdraw
    | SetVersion
    | GetAdmission
    | GetKeys
    | WaitKeys
)
UnitRequest: TypeAlias = (
    ReadBlock | Reserve | ReturnSpan | AbortBlocks | Write | Pin | Unpin | StillHeld | Fetch | GetUnitStats | Introduce
)
Request: TypeAlias = ControllerRequest | UnitRequest
Reply: TypeAlias = (
    Done
    | Acked
    | ErrorReply
    | PutDone
    | Drawn
    | Status
    | Report
    | Names
    | Units
    | Announced
    | Settled
    | Reserved
    | Pinned
    | Fetched
    | Leased
    | Admitted
    | Reconciled
    | CutDone
    | BlockBytes
    | Keys
)
ONE_WAY: tuple[type[Any], ...] = (
    *(Cancel, Withdraw, FreesDone, FreeBlocks, EndCut),
    *(ReturnSpan, AbortBlocks, Unpin, StillHeld),
)

__all__ = [
    "ANY_GENERATION",
    "AbortBlocks",
    "AbortGroup",
    "Ack",
    "AckMany",
    "Acked",
    "Admit",
    "Admitted",
    "Announce",
    "Announced",
    "BlockBytes",
    "Cancel",
    "Clear",
    "ColumnSpec",
    "ControllerRequest",
    "Cut",
    "CutDone",
    "Done",
    "Draw",
    "Drawn",
    "Drop",
    "EndCut",
    "ErrorReply",
    "Fetch",
    "Fetched",
    "Frames",
    "FreeBlocks",
    "FreesDone",
    "GetAdmission",
    "GetAudit",
    "GetExplanation",
    "GetKeys",
    "GetStatus",
    "GetUnitStats",
    "Introduce",
    "Int64s",
    "KeepCut",
    "Keys",
    "Leased",
    "ListPartitions",
    "ListUnits",
    "Locate",
    "Location",
    "MESSAGE_TYPES",
    "Names",
    "ONE_WAY",
    "PROTOCOL_VERSION",
    "Pin",
    "Pinned",
    "ProcessId",
    "Put",
    "PutDone",
    "ReadBlock",
    "Reconcile",
    "Reconciled",
    "RegisterSampler",
    "Release",
    "Renew",
    "Reply",
    "Report",
    "Request",
    "Reserve",
    "Reserved",
    "ResetConsumption",
    "Restore",
    "ReturnSpan",
    "SPAN_SHIFT",
    "SealGroup",
    "SetTags",
    "SetVersion",
    "Settle",
    "Settled",
    "Status",
    "StillHeld",
    "UNIT_SHIFT",
    "UnitInfo",
    "UnitRequest",
    "Units",
    "Unpin",
    "WaitKeys",
    "Withdraw",
    "Write",
    "int64s_of",
    "message",
]
