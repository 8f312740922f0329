package journal

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/encoding/protowire"

	"wharf/domain"
)

// A frame is what a commit holds, in the value of its record: the events, and what became of the keyed commands that
// were decided in it. On the wire it is a protocol buffer, written by hand because a reader must be able to tell a
// broken frame without any reflection, and because the data of an event stays opaque bytes:
//
//	message Frame   { repeated Event events = 1; repeated Outcome outcomes = 2; }
//	message Event   { bytes id = 1; string name = 2; fixed64 unix_nanos = 3; bytes data = 4;
//	                  string cause_topic = 5; uint32 cause_partition = 6; uint64 cause_seq = 7; string cause_group = 8; }
//	message Outcome { bytes key = 1; bytes request = 2; uint32 events = 3; string code = 4; string detail = 5;
//	                  uint32 note = 6; }
type frame struct {
	events   []frameEvent
	outcomes []outcome
}

type frameEvent struct {
	id    uuid.UUID
	name  string
	time  time.Time
	data  []byte
	cause domain.Position
	group string
}

// outcome is what a keyed command is answered, now and on every retry.
type outcome struct {
	key, request digest
	events       int // of the commit, up to and including this command's
	note         int
	refusal      *domain.Refusal
}

// digest stands for a key or a request of any length.
type digest [16]byte

func digestOf(s string) (d digest) {
	sum := sha256.Sum256([]byte(s))
	copy(d[:], sum[:])
	return d
}

func (d digest) short() uint64 { return binary.BigEndian.Uint64(d[:]) }

var errBrokenFrame = errors.New("broken frame")

// What an event, and an outcome without a refusal, need at most beside their text.
const (
	eventOverhead   = 64
	outcomeOverhead = 64
)

func (f *frame) encode() []byte {
	size := 0
	for _, e := range f.events {
		size += eventOverhead + len(e.name) + len(e.data) + len(e.cause.Topic) + len(e.group)
	}
	b, m := make([]byte, 0, size+outcomeOverhead*len(f.outcomes)), make([]byte, 0, size)
	for _, e := range f.events {
		m = m[:0]
		m = appendBytes(m, 1, e.id[:])
		m = appendBytes(m, 2, e.name)
		m = protowire.AppendTag(m, 3, protowire.Fixed64Type)
		m = protowire.AppendFixed64(m, uint64(e.time.UnixNano()))
		m = appendBytes(m, 4, e.data)
		if e.cause.Topic != "" {
			m = appendBytes(m, 5, e.cause.Topic)
			m = appendVarint(m, 6, uint64(e.cause.Partition))
			m = appendVarint(m, 7, uint64(e.cause.Seq))
			if e.group != "" {
				m = appendBytes(m, 8, e.group)
			}
		}
		b = appendBytes(b, 1, m)
	}
	for _, o := range f.outcomes {
		m = m[:0]
		m = appendBytes(m, 1, o.key[:])
		m = appendBytes(m, 2, o.request[:])
		m = appendVarint(m, 3, uint64(o.events))
		if o.refusal != nil {
			m = appendBytes(m, 4, o.refusal.Code)
			m = appendBytes(m, 5, o.refusal.Detail)
		}
		if o.note > 0 {
			m = appendVarint(m, 6, uint64(o.note))
		}
		b = appendBytes(b, 2, m)
	}
	return b
}

// decodeFrame reverses encode. A frame that does not hold `events` whole events is broken.
func decodeFrame(value []byte, events int) (frame, error) {
	f := frame{events: make([]frameEvent, 0, min(events, len(value)/16))}
	ok := fields(value, func(n protowire.Number, v []byte, _ uint64) bool {
		switch n {
		case 1:
			e, ok := decodeEvent(v)
			f.events = append(f.events, e)
			return ok
		case 2:
			o, ok := decodeOutcome(v)
			f.outcomes = append(f.outcomes, o)
			return ok
		}
		return false
	})
	if !ok || len(f.events) != events {
		return frame{}, errBrokenFrame
	}
	return f, nil
}

func decodeEvent(value []byte) (e frameEvent, ok bool) {
	ok = fields(value, func(n protowire.Number, v []byte, i uint64) bool {
		switch n {
		case 1:
			return copy(e.id[:], v) == len(e.id) && len(v) == len(e.id)
		case 2:
			e.name = string(v)
		case 3:
			e.time = time.Unix(0, int64(i)).UTC()
		case 4:
			e.data = v
		case 5:
			e.cause.Topic = string(v)
		case 6:
			e.cause.Partition = int32(i)
			return i <= maxInt32
		case 7:
			e.cause.Seq = int64(i)
			return i <= maxInt64
		case 8:
			e.group = string(v)
		default:
			return false
		}
		return true
	})
	return e, ok && e.id != uuid.Nil && e.name != "" && !strings.Contains(e.cause.Topic, "/")
}

func decodeOutcome(value []byte) (o outcome, ok bool) {
	code, detail := "", ""
	ok = fields(value, func(n protowire.Number, v []byte, i uint64) bool {
		switch n {
		case 1:
			return copy(o.key[:], v) == len(o.key) && len(v) == len(o.key)
		case 2:
			return copy(o.request[:], v) == len(o.request) && len(v) == len(o.request)
		case 3:
			o.events = int(i)
			return i <= MaxEvents
		case 4:
			code = string(v)
		case 5:
			detail = string(v)
		case 6:
			o.note = int(i)
			return i <= maxInt32
		default:
			return false
		}
		return true
	})
	if code != "" {
		o.refusal = domain.Refuse(code, detail)
	}
	return o, ok
}

func appendBytes[T string | []byte](b []byte, n protowire.Number, v T) []byte {
	b = protowire.AppendTag(b, n, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(len(v)))
	return append(b, v...)
}

func appendVarint(b []byte, n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

// fields calls f with every field of a message: v for bytes, i for numbers. The layout of a format never grows, so an
// unknown field is as broken as a cut one.
func fields(b []byte, f func(n protowire.Number, v []byte, i uint64) bool) bool {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return false
		}
		b = b[size:]
		var v []byte
		var i uint64
		switch kind {
		case protowire.BytesType:
			v, size = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			i, size = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			i, size = protowire.ConsumeFixed64(b)
		default:
			return false
		}
		if size < 0 || !f(n, v, i) {
			return false
		}
		b = b[size:]
	}
	return true
}
