// Package journal answers the question "how can a Kafka topic be an event store?": optimistic concurrency, atomic
// append, exactly-once commands and a gap-free public event log on nothing but a partitioned, ordered log. There is
// no Kafka in it: Log is the seam.
//
// Read this file first, it is the whole idea: a commit names its parent, and the log's order decides which of two
// commits on one parent counts. Then journal.go (what a service is given), frame.go (what a commit holds), stream.go and
// fold.go (the state that the log adds up to), writer.go (how a command becomes a commit), barrier.go (when "nothing
// happened" is a true answer), and publisher.go with envelope.go (how accepted events become public).
package journal

import (
	"bytes"
	"encoding/hex"
	"strconv"
	"time"

	"github.com/google/uuid"
)

// Format is the newest layout of commits that this program reads, and the one it writes.
const Format = 1

// MaxEvents is how many events one commit may hold.
const MaxEvents = 10_000

// The headers of a journal record. They alone decide what is accepted: a value that cannot be decoded must not.
const (
	headerFormat     = "wharf-format"
	headerCommit     = "wharf-commit"
	headerParent     = "wharf-parent"
	headerVersion    = "wharf-version"
	headerEvents     = "wharf-events"
	headerPartitions = "wharf-partitions"
	headerTrace      = "traceparent"
	headerSkip       = "wharf-skip" // of an operator's record: the offset to pass over, see NewSkipRecord
)

// Head is where a stream stands: its last accepted commit and how many events it has. The zero Head is that of a
// stream without any.
type Head struct {
	Commit  uuid.UUID
	Version int64
}

// Commit is what the headers of a record say: events appended to the stream whose head is Parent, all or none.
type Commit struct {
	ID     uuid.UUID
	Parent Head
	Events int
}

// Verdict is what becomes of a record.
type Verdict int

// String is the verdict's name in metrics and logs.
func (v Verdict) String() string {
	return [...]string{"accepted", "rejected", "impossible", "foreign", "malformed", "misplaced", "too_new"}[v]
}

// The verdicts. All but TooNew are final: every reader of the log, at any time, comes to the same one.
const (
	Accepted   Verdict = iota
	Rejected           // lost: another commit was first on the same parent
	Impossible         // rejected, and from a version that the stream never had: no correct writer does that
	Foreign            // ignored: not a commit
	Malformed          // ignored: a header is missing, repeated or makes no sense
	Misplaced          // ignored: its key does not belong here, or its writer believes in another partition count
	TooNew             // not decided: a newer program's format; the reader must halt
)

// Judge is the acceptance rule: what becomes of a record, given the heads that the accepted records before it in the
// partition have left behind, and the configured number of partitions.
func Judge(r Record, partitions int, head func(stream string) Head) (Commit, Verdict) {
	h := headersOf(r)
	switch format := h.format(); {
	case format > Format:
		return Commit{}, TooNew // whatever the other headers say
	case format < 1:
		return Commit{}, Foreign
	}
	c := Commit{ID: h.uuid(headerCommit), Events: int(h.number(headerEvents, MaxEvents))}
	c.Parent.Version = h.number(headerVersion, maxInt64)
	if len(h.one(headerParent)) > 0 {
		c.Parent.Commit = h.uuid(headerParent)
	}
	count := h.number(headerPartitions, maxInt32)
	if h.malformed || len(r.Key) == 0 {
		return Commit{}, Malformed
	}
	if int(count) != partitions || Partition(r.Key, partitions) != r.Partition {
		return Commit{}, Misplaced
	}
	switch now := head(string(r.Key)); {
	case c.Parent == now:
		return c, Accepted
	case c.Parent.Version > now.Version:
		return c, Impossible
	}
	return c, Rejected
}

const (
	maxInt32 = 1<<31 - 1
	maxInt64 = 1<<63 - 1
)

// headers reads the headers of one record strictly: one spelling a value, so that no two readers can differ.
type headers struct {
	list      []Header
	malformed bool
}

func headersOf(r Record) headers { return headers{list: r.Headers} }

// format is the record's format: 0 when it has none, too many or a senseless one. Of several the highest counts, if
// this program does not know it: halting needlessly is better than diverging from a newer reader.
func (h *headers) format() (format int64) {
	seen := 0
	for _, header := range h.list {
		if header.Key != headerFormat {
			continue
		}
		seen++
		n, ok := number(header.Value)
		if n > Format {
			return n
		}
		if ok {
			format = n
		}
	}
	if seen != 1 {
		return 0
	}
	return format
}

// one is the value of a header that must be there exactly once.
func (h *headers) one(key string) (value []byte) {
	seen := 0
	for _, header := range h.list {
		if header.Key == key {
			seen++
			value = header.Value
		}
	}
	if seen != 1 {
		h.malformed = true
		return nil
	}
	return value
}

func (h *headers) number(key string, most int64) int64 {
	n, ok := number(h.one(key))
	if !ok || n > most {
		h.malformed = true
	}
	return n
}

func (h *headers) uuid(key string) uuid.UUID {
	value := h.one(key)
	id, err := uuid.ParseBytes(value)
	if err != nil || !spells(value, id) || id.Version() != 7 || id.Variant() != uuid.RFC4122 {
		h.malformed = true
	}
	return id
}

// spells says that the text is how the id is written: in lower case, with hyphens and nothing else.
func spells(text []byte, id uuid.UUID) bool {
	var buffer [36]byte
	return bytes.Equal(text, appendID(buffer[:0], id))
}

func appendID(b []byte, id uuid.UUID) []byte {
	b = append(hex.AppendEncode(b, id[:4]), '-')
	b = append(hex.AppendEncode(b, id[4:6]), '-')
	b = append(hex.AppendEncode(b, id[6:8]), '-')
	b = append(hex.AppendEncode(b, id[8:10]), '-')
	return hex.AppendEncode(b, id[10:])
}

// number reads a decimal without sign, spaces or leading zeros. One that is too large for an int64 reads as the
// largest, and is not ok.
func number(s []byte) (n int64, ok bool) {
	if len(s) == 0 || len(s) > 1 && s[0] == '0' {
		return 0, false
	}
	for _, c := range s {
		if c < '0' || c > '9' {
			return 0, false
		}
	}
	if len(s) > 19 {
		return maxInt64, false
	}
	for _, c := range s {
		if n = n*10 + int64(c-'0'); n < 0 {
			return maxInt64, false
		}
	}
	return n, true
}

// newCommitRecord is the record that proposes the commit.
func newCommitRecord(stream string, partitions int, c Commit, trace string, frame []byte) Record {
	w := newHeaderWriter(7, 160)
	w.number(headerFormat, Format)
	w.id(headerCommit, c.ID)
	if c.Parent.Commit == uuid.Nil {
		w.text(headerParent, "")
	} else {
		w.id(headerParent, c.Parent.Commit)
	}
	w.number(headerVersion, c.Parent.Version)
	w.number(headerEvents, int64(c.Events))
	w.number(headerPartitions, int64(partitions))
	if trace != "" {
		w.text(headerTrace, trace)
	}
	key := []byte(stream)
	return Record{Partition: Partition(key, partitions), Key: key, Value: frame, Headers: w.headers}
}

// headerWriter makes the headers of a record with their values in one piece of memory. There are many records.
type headerWriter struct {
	headers []Header
	values  []byte
}

func newHeaderWriter(headers, bytes int) headerWriter {
	return headerWriter{make([]Header, 0, headers), make([]byte, 0, bytes)}
}

// add takes over what was appended to values since they ended at `from`.
func (w *headerWriter) add(key string, from int, values []byte) {
	w.values = values
	w.headers = append(w.headers, Header{key, values[from:len(values):len(values)]})
}

func (w *headerWriter) text(key, value string) {
	w.add(key, len(w.values), append(w.values, value...))
}

func (w *headerWriter) number(key string, n int64) {
	w.add(key, len(w.values), strconv.AppendInt(w.values, n, 10))
}

func (w *headerWriter) id(key string, id uuid.UUID) {
	w.add(key, len(w.values), appendID(w.values, id))
}

func (w *headerWriter) time(key string, t time.Time) {
	w.add(key, len(w.values), t.UTC().AppendFormat(w.values, time.RFC3339Nano))
}
