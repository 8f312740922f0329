package postgres

import (
	"testing"
	"time"
)

func TestTurnsLeaveRoomWhenTheyAreSlowerThanTheyCanBe(t *testing.T) {
	const ms = time.Millisecond
	ts := newTurns()
	for _, turn := range []struct{ took, rest time.Duration }{
		{3 * ms, 0}, {2 * ms, 0}, {2 * ms, 0}, {12 * ms, 10 * ms},
	} {
		if rest := ts.slowness(turn.took); rest != turn.rest {
			t.Errorf("after a turn of %s comes a rest of %s, want %s", turn.took, rest, turn.rest)
		}
	}
	for range 2000 { // larger batches, or a slower machine, for long: that is what turns take now
		ts.slowness(12 * ms)
	}
	if rest := ts.slowness(12 * ms); rest > ms {
		t.Errorf("turns that are always as slow still leave %s", rest)
	}
}
