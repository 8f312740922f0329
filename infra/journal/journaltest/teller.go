package journaltest

import (
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"wharf/domain"
	"wharf/infra/journal"
)

// Teller makes public events that nobody decided, as a publisher would: their positions, versions, ids and times. Each
// is a millisecond after the one before. It is one goroutine's.
type Teller struct {
	Clock time.Time          // of the last event
	Seqs  map[string][]int64 // of the last event of each partition, by topic

	versions map[string]int64 // by topic and stream
	ids      uint64
}

// NewTeller makes one that has told nothing.
func NewTeller(clock time.Time, partitions int, topics ...string) *Teller {
	t := &Teller{Clock: clock, Seqs: map[string][]int64{}, versions: map[string]int64{}}
	for _, topic := range topics {
		t.Seqs[topic] = make([]int64, partitions)
	}
	return t
}

// Next is the stream's next event.
func (t *Teller) Next(topic, stream, name string, data []byte) domain.Recorded {
	p := journal.Partition([]byte(stream), len(t.Seqs[topic]))
	t.Seqs[topic][p]++
	t.versions[topic+stream]++
	t.Clock = t.Clock.Add(time.Millisecond)
	t.ids++
	return domain.Recorded{
		ID: uuid.NewSHA1(uuid.Nil, fmt.Appendf(nil, "event %d", t.ids)), Name: name,
		Service: strings.TrimSuffix(topic, ".events"), Stream: stream, Version: t.versions[topic+stream], Time: t.Clock,
		Position: domain.Position{Topic: topic, Partition: p, Seq: t.Seqs[topic][p]}, Data: data,
	}
}
