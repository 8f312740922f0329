package journal

import "time"

// When several replicas write to one stream as fast as they can, each commit that counts makes those of the others
// lose. Safety does not mind, but the work is wasted, and so they take turns, by what each of them sees in the log and
// without a word between them: whoever loses waits until the stream is quiet, and whoever goes on winning while others
// wait stops after a while. All of it is measured in the time that a commit takes.
const (
	quiet     = 2                      // commit times without a commit of others, before the stream is tried again;
	quietMore = 4                      // and up to as many more, by chance
	yield     = 2 + quiet + quietMore  // commit times that one who stops leaves to the others
	longTurn  = 100 * time.Millisecond // commits that follow each other until one stops
	contended = time.Second            // for how long others are minded after they were seen
)

// rivals notes that another replica has written to the lane's stream. If anything waits, it goes on waiting until that
// one is done.
func (p *partition[S]) rivals(name string, l *lane[S]) {
	l.rival, l.since = time.Now(), time.Time{}
	if len(l.queue) == 0 {
		return
	}
	unit := p.commitTime()
	p.rest(name, l, quiet*unit+time.Duration(p.Jitter(int64(quietMore*unit))))
}

// won notes that a commit of ours was accepted, and stops when others have waited long enough.
func (p *partition[S]) won(name string, l *lane[S]) {
	now := time.Now()
	switch {
	case len(l.queue) == 0 || now.Sub(l.rival) > contended:
		l.since = time.Time{}
	case l.since.IsZero():
		l.since = now
	case now.Sub(l.since) > max(longTurn, 8*p.commitTime()):
		l.since = time.Time{}
		p.rest(name, l, yield*p.commitTime())
	}
}

// commitTime is how long a commit takes from its proposal to its acceptance, lately.
func (p *partition[S]) commitTime() time.Duration { return max(p.took, time.Millisecond) }

// rest leaves the stream alone for the time, from now on.
func (p *partition[S]) rest(name string, l *lane[S], d time.Duration) {
	if l.pause != nil {
		l.pause.Reset(d)
		return
	}
	var t *time.Timer
	t = time.AfterFunc(d, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.pause == t { // and not one that was set again when it had just ended
			l.pause = nil
			p.turn(name)
			p.tidy(name, l)
		}
	})
	l.pause = t
}
