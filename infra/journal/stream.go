package journal

import (
	"slices"

	"wharf/commands"
	"wharf/domain"
)

// KeysPerStream is how many Idempotency-Keys a stream remembers at least, beside the one that created it. A retry that
// comes after that many other keyed commands on the same entity is a new command. (Those of the last commit are all
// remembered, however many they are: they were decided at the same time.)
const KeysPerStream = 128

// stream is what one entity's accepted commits add up to.
type stream[S commands.State[S]] struct {
	Head
	seq         int64 // of its last event in the partition's count
	state       S
	causes      []cause
	creator     *answer
	recent      []*answer // oldest first
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
	key, request digest
	receipt      commands.Receipt
	refusal      *domain.Refusal
}

func (s *stream[S]) exists() bool { return s.Version > 0 }

// heard says whether the cause is at or below what the stream has heard of.
func (s *stream[S]) heard(group string, p domain.Position) bool {
	for _, c := range s.causes {
		if c.partition == p.Partition && c.topic == p.Topic && c.group == group {
			return p.Seq <= c.seq
		}
	}
	return false
}

// hear changes causes in place: a draft clones them first.
func (s *stream[S]) hear(group string, p domain.Position) {
	for i := range s.causes {
		if c := &s.causes[i]; c.partition == p.Partition && c.topic == p.Topic && c.group == group {
			c.seq = max(c.seq, p.Seq)
			return
		}
	}
	s.causes = append(s.causes, cause{group, p.Topic, p.Partition, p.Seq})
}

func (s *stream[S]) answered(key digest) *answer {
	if s.creator != nil && s.creator.key == key {
		return s.creator
	}
	for _, a := range s.recent {
		if a.key == key {
			return a
		}
	}
	return nil
}

// accept folds an accepted commit in. It counts whatever its frame holds; a frame that cannot be read quarantines
// the stream, which then stands still for this program. seq is the partition's count before the commit. It returns the answers
// to keyed commands that the commit holds.
func (s *stream[S]) accept(name string, c Commit, value []byte, seq int64, at func(int64) domain.Position,
	vocabulary domain.Events) (told []*answer, err error) {
	creating := !s.exists()
	s.Head = Head{c.ID, c.Parent.Version + int64(c.Events)}
	if c.Events > 0 {
		s.seq = seq + int64(c.Events)
	}
	if s.quarantined {
		return nil, nil
	}
	f, err := decodeFrame(value, c.Events)
	if err != nil {
		s.quarantined = true
		return nil, err
	}
	events := make([]domain.Event, len(f.events))
	for i, e := range f.events {
		if events[i], err = vocabulary.Decode(e.name, e.data); err != nil {
			s.quarantined = true
			return nil, err
		}
	}
	for i, e := range f.events {
		s.state = s.state.Evolve(events[i])
		if e.group != "" {
			s.hear(e.group, e.cause)
		}
	}
	if n := len(s.recent) - KeysPerStream; n > 0 && len(f.outcomes) > 0 {
		s.recent = slices.Delete(s.recent, 0, n)
	}
	for _, o := range f.outcomes {
		told = append(told, &answer{o.key, o.request, commands.Receipt{
			Stream: name, Version: c.Parent.Version + int64(o.events), Position: at(seq + int64(o.events)), Note: o.note,
		}, o.refusal})
	}
	s.recent = append(s.recent, told...)
	if creating && len(told) > 0 {
		s.creator = told[0]
	}
	if s.state.Closed() {
		// Whatever a policy may still ask of it, the state itself answers "nothing to do".
		s.causes = nil
	}
	return told, nil
}
