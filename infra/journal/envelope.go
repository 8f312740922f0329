package journal

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"wharf/domain"
)

// The public events are CloudEvents 1.0 in the Kafka protocol binding's binary mode: attributes are headers, the value
// is the data, and the record's key is the stream's id (the extension attribute "partitionkey" of the specification).
// See https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
const (
	ceSpecVersion = "ce_specversion"
	ceID          = "ce_id"
	ceSource      = "ce_source"
	ceType        = "ce_type"
	ceSubject     = "ce_subject"
	ceTime        = "ce_time"
	ceTrace       = "ce_traceparent"

	// Wharf's extension attributes.
	ceSeq     = "ce_journalseq"    // dense count of the partition's accepted events, from 1
	ceOffset  = "ce_journaloffset" // of the commit in the journal
	ceIndex   = "ce_journalindex"  // of the event in its commit, from 0
	ceVersion = "ce_streamversion" // of the stream after the event
	ceCause   = "ce_cause"         // position of the event that it was made for

	contentType = "content-type"
	sourceRoot  = "/wharf/"
)

// Unreadable is the stored name of the event that stands in for one whose frame is broken, so that the count of
// public events stays dense. Its data is empty.
const Unreadable = "wharf.unreadable.v1"

// NewEventRecord is the public record that tells the event. ParseEvent reverses it.
func NewEventRecord(e domain.Recorded) Record {
	w := newHeaderWriter(13, 320)
	w.text(ceSpecVersion, "1.0")
	w.id(ceID, e.ID)
	w.text(ceSource, sourceRoot+e.Service)
	w.text(ceType, e.Name)
	w.text(ceSubject, e.Stream)
	w.time(ceTime, e.Time)
	w.number(ceSeq, e.Seq)
	w.number(ceOffset, e.Offset)
	w.number(ceIndex, int64(e.Index))
	w.number(ceVersion, e.Version)
	if e.Cause.Topic != "" {
		w.text(ceCause, e.Cause.String())
	}
	if e.Trace != "" {
		w.text(ceTrace, e.Trace)
	}
	if e.Name != Unreadable {
		w.text(contentType, "application/json")
	}
	return Record{Partition: e.Partition, Key: []byte(e.Stream), Value: e.Data, Headers: w.headers}
}

// ParseEvent reads a record of a public topic. It is false for a record without the envelope (somebody else's), which
// a consumer skips and counts.
func ParseEvent(topic string, r Record) (domain.Recorded, bool) {
	e := domain.Recorded{Data: r.Value, Position: domain.Position{Topic: topic, Partition: r.Partition}}
	var spec, source, name []byte
	var err error
	number := func(v []byte) (n int64) {
		var bad error
		if n, bad = strconv.ParseInt(string(v), 10, 64); bad != nil {
			err = bad
		}
		return n
	}
	for _, h := range r.Headers {
		switch h.Key {
		case ceSpecVersion:
			spec = h.Value
		case ceID:
			var bad error
			if e.ID, bad = uuid.ParseBytes(h.Value); bad != nil {
				err = bad
			}
		case ceSource:
			source = h.Value
		case ceType:
			name = h.Value
		case ceSubject:
			e.Stream = string(h.Value)
		case ceTime:
			var bad error
			if e.Time, bad = time.Parse(time.RFC3339Nano, string(h.Value)); bad != nil {
				err = bad
			} else if y := e.Time.UTC().Year(); y < 0 || y > 9999 { // which its zone made of one that can be written
				err = errors.New("a year that cannot be written")
			}
		case ceSeq:
			e.Seq = number(h.Value)
		case ceOffset:
			e.Offset = number(h.Value)
		case ceIndex:
			e.Index = int(number(h.Value))
		case ceVersion:
			e.Version = number(h.Value)
		case ceTrace:
			e.Trace = string(h.Value)
		case ceCause:
			var bad error
			if e.Cause, bad = ParsePosition(string(h.Value)); bad != nil {
				err = bad
			}
		}
	}
	service, ours := bytes.CutPrefix(source, []byte(sourceRoot))
	if err != nil || !ours || string(spec) != "1.0" || e.ID == uuid.Nil || len(name) == 0 || e.Seq < 1 || e.Version < 1 {
		return domain.Recorded{}, false
	}
	e.Service, e.Name = known.text(service), known.text(name)
	return e, true
}

// known are the names of events and services that were seen, of which there are few: nobody needs many copies of one.
var known texts

type texts struct {
	seen atomic.Pointer[map[string]string]
}

const (
	mostTexts   = 1000
	longestText = 100
)

// text is the text, in one copy if it is among the first.
func (t *texts) text(b []byte) string {
	seen := t.seen.Load()
	if seen == nil {
		seen = &map[string]string{}
	}
	if s, ok := (*seen)[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(*seen) < mostTexts && len(s) <= longestText {
		more := maps.Clone(*seen)
		more[s] = s
		t.seen.Store(&more) // what another adds at the same time is added again when it is next seen
	}
	return s
}

// ParsePosition reverses domain.Position.String.
func ParsePosition(s string) (domain.Position, error) {
	parts := strings.Split(s, "/")
	if len(parts) == 3 && parts[0] != "" {
		p, err1 := strconv.ParseInt(parts[1], 10, 32)
		seq, err2 := strconv.ParseInt(parts[2], 10, 64)
		if err1 == nil && err2 == nil && p >= 0 && seq >= 0 {
			return domain.Position{Topic: parts[0], Partition: int32(p), Seq: seq}, nil
		}
	}
	return domain.Position{}, fmt.Errorf("a position reads topic/partition/seq")
}

// Next applies the consumer rule: whether the event is the next one after `last`, or a repetition to skip. A gap is an
// error, and the consumer must halt: an event is missing from the log, and going on would lose it.
func Next(last int64, e domain.Recorded) (process bool, err error) {
	if e.Seq > last+1 {
		return false, fmt.Errorf("%s partition %d has a gap: event %d follows %d: records were lost, or somebody else wrote one; "+
			"restore the topic as its service published it, and start what reads it anew", e.Topic, e.Partition, e.Seq, last)
	}
	return e.Seq == last+1, nil
}
