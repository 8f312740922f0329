package journal

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Fingerprint is all that the partition's fold adds up to, and the offset up to which it has folded.
func (j *Journal[S]) Fingerprint(partition int32) (next int64, state string) {
	p := j.partitions[partition]
	p.mu.Lock()
	defer p.mu.Unlock()
	var b strings.Builder
	fmt.Fprintln(&b, p.seq, p.ignored, p.marks)
	for _, name := range slices.Sorted(maps.Keys(p.streams.byName)) {
		s := p.streams.byName[name]
		fmt.Fprintln(&b, name, s.Head, s.seq, s.state)
		if s.creator != nil {
			fmt.Fprintln(&b, *s.creator)
		}
		if s.memory != nil {
			fmt.Fprintln(&b, s.memory.causes, s.memory.quarantined)
			for _, a := range s.memory.recent {
				fmt.Fprintln(&b, a)
			}
		}
	}
	return p.next, b.String()
}

func (a answer) String() string {
	s := fmt.Sprintf("%x %x %d %d", a.key, a.request, a.version, a.seq)
	if a.rest != nil && a.rest.refusal != nil {
		s += a.rest.refusal.Code
	}
	return s
}
