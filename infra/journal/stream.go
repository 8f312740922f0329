package journal

import (
	"slices"
	"strings"

	"wharf/commands"
	"wharf/domain"
)

// KeysPerStream is how many Idempotency-Keys a stream remembers at least, beside the one that created it. A retry that
// comes after that many other keyed commands on the same entity is a new command. (Those of the last commit are all
// remembered, however many they are: they were decided at the same time.)
const KeysPerStream = 128

// stream is what one entity's accepted commits add up to. There may be millions, most of them closed, so what those do
// not need lies apart.
type stream[S commands.State[S]] struct {
	Head
	seq     int64 // of its last event in the partition's count
	state   S
	creator *answer
	memory  *memory // nil when there is nothing to remember
}

// streams is all streams of a partition. None is ever removed, so they and their names are allocated many at a time: it
// takes less memory than one by one, leaves no holes, and gives the garbage collector less to look at.
type streams[S commands.State[S]] struct {
	byName map[string]*stream[S]
	free   []stream[S]
	names  strings.Builder
}

const (
	streamsAtATime   = 128
	nameBytesAtATime = 4 << 10
)

// add makes the stream of that name, which there must not be yet.
func (ss *streams[S]) add(name string) *stream[S] {
	if len(ss.free) == 0 {
		ss.free = make([]stream[S], streamsAtATime)
	}
	s := &ss.free[0]
	ss.free = ss.free[1:]
	if ss.names.Cap()-ss.names.Len() < len(name) {
		ss.names.Reset() // what was written stays with those who hold it
		ss.names.Grow(max(nameBytesAtATime, len(name)))
	}
	ss.names.WriteString(name)
	ss.byName[ss.names.String()[ss.names.Len()-len(name):]] = s
	return s
}

// memory is what a stream remembers beside its state.
type memory struct {
	causes      []cause
	recent      []answer // oldest first, without the creator's
	quarantined bool
}

// cause is the last event of one source that the stream has heard of from one consumer group. As a policy hands a
// source's events to a stream in order, every earlier one is a repetition.
type cause struct {
	group, topic string
	partition    int32
	seq          int64
}

// answer is what a keyed command was answered.
type answer struct {
	key     digest
	request uint64 // a digest's first half: enough to notice a client's slip
	version int64
	seq     int64
	rest    *rest // nil when there is no note and no refusal
}

type rest struct {
	note    int
	refusal *domain.Refusal
}

func newAnswer(o outcome, version, seq int64) answer {
	a := answer{o.key, o.request.short(), version + int64(o.events), seq + int64(o.events), nil}
	if o.note != 0 || o.refusal != nil {
		a.rest = &rest{o.note, o.refusal}
	}
	return a
}

func (s *stream[S]) exists() bool { return s.Version > 0 }

func (s *stream[S]) quarantined() bool { return s.memory != nil && s.memory.quarantined }

func (s *stream[S]) quarantine() { s.remember().quarantined = true }

func (s *stream[S]) remember() *memory {
	if s.memory == nil {
		s.memory = &memory{}
	}
	return s.memory
}

// heard says whether the cause is at or below what the stream has heard of.
func (s *stream[S]) heard(group string, p domain.Position) bool {
	if s.memory == nil {
		return false
	}
	for _, c := range s.memory.causes {
		if c.partition == p.Partition && c.topic == p.Topic && c.group == group {
			return p.Seq <= c.seq
		}
	}
	return false
}

// hear changes the memory in place: a draft has one of its own, see forDraft.
func (s *stream[S]) hear(group string, p domain.Position) {
	m := s.remember()
	for i := range m.causes {
		if c := &m.causes[i]; c.partition == p.Partition && c.topic == p.Topic && c.group == group {
			c.seq = max(c.seq, p.Seq)
			return
		}
	}
	m.causes = append(m.causes, cause{group, p.Topic, p.Partition, p.Seq})
}

// forDraft is a memory with causes that may be changed.
func (m *memory) forDraft() *memory {
	if m == nil {
		return nil
	}
	c := *m
	c.causes = slices.Clone(m.causes)
	return &c
}

func (s *stream[S]) answered(key digest) *answer {
	if s.creator != nil && s.creator.key == key {
		return s.creator
	}
	if s.memory != nil {
		for i := range s.memory.recent {
			if a := &s.memory.recent[i]; a.key == key {
				return a
			}
		}
	}
	return nil
}

// accept folds an accepted commit in. It counts whatever its frame holds; a frame that cannot be read quarantines
// the stream, which then stands still for this program. seq is the partition's count before the commit. It returns the answers
// to keyed commands that the commit holds.
func (s *stream[S]) accept(c Commit, value []byte, seq int64, vocabulary domain.Events) (told []answer, err error) {
	creating := !s.exists()
	s.Head = Head{c.ID, c.Parent.Version + int64(c.Events)}
	if c.Events > 0 {
		s.seq = seq + int64(c.Events)
	}
	if s.quarantined() {
		return nil, nil
	}
	f, err := decodeFrame(value, c.Events)
	if err != nil {
		s.quarantine()
		return nil, err
	}
	events := make([]domain.Event, len(f.events))
	for i, e := range f.events {
		if events[i], err = vocabulary.Decode(e.name, e.data); err != nil {
			s.quarantine()
			return nil, err
		}
	}
	for i, e := range f.events {
		s.state = s.state.Evolve(events[i])
		if e.group != "" {
			s.hear(e.group, e.cause)
		}
	}
	if len(f.outcomes) > 0 {
		told = make([]answer, len(f.outcomes))
		for i, o := range f.outcomes {
			told[i] = newAnswer(o, c.Parent.Version, seq)
		}
		s.keep(told, creating)
	}
	if s.state.Closed() && s.memory != nil {
		// Whatever a policy may still ask of it, the state itself answers "nothing to do".
		if s.memory.causes = nil; s.memory.recent == nil {
			s.memory = nil
		}
	}
	return told, nil
}

// keep remembers the answers of one commit, and forgets those that are too old by now.
func (s *stream[S]) keep(told []answer, creating bool) {
	if creating {
		first := told[0] // a copy: the others need not live as long
		s.creator, told = &first, told[1:]
	}
	if len(told) == 0 {
		return
	}
	m := s.remember()
	if n := len(m.recent) - KeysPerStream; n > 0 {
		m.recent = slices.Delete(m.recent, 0, n)
	}
	m.recent = append(m.recent, told...)
}
