//go:build torture && linux

package torture_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"time"

	"wharf/projections"
)

// replayer builds read models anew, takes replays back and verifies, again and again; some of these are killed in the
// middle. That one fails because a server was tortured is no fault; that it finds a difference is one.
type replayer struct {
	run *run

	replays, rollbacks, verified, killed, failed, differences atomic.Int64
}

const replayPause = 500 * time.Millisecond

func (p *replayer) torment(ctx context.Context) {
	for ctx.Err() == nil {
		model := projections.All[rand.IntN(len(projections.All))].Name
		args := []string{"replay", model}
		switch rand.IntN(6) {
		case 0:
			args = []string{"replay", "--all"}
		case 1:
			args = []string{"replay", "--rollback", model}
		case 2:
			args = []string{"verify", model}
		}
		limit, cancel := context.WithCancel(ctx)
		if rand.IntN(3) == 0 {
			limit, cancel = context.WithTimeout(ctx, rand.N(3*time.Second))
		}
		p.job(ctx, limit, args, p.run.say)
		cancel()
		sleep(ctx, replayPause)
	}
}

// job does it, and counts how it went. It is killed when limit ends; when ctx has ended as well, that counts for nothing. A
// failure is told to complain.
func (p *replayer) job(ctx, limit context.Context, args []string, complain func(format string, args ...any)) {
	out, err := p.do(limit, args...)
	switch {
	case bytes.Contains(out, []byte("differ")):
		p.differences.Add(1)
		p.run.clients.find("wharf %s: %s", strings.Join(args, " "), out)
	case ctx.Err() != nil:
	case err != nil && limit.Err() != nil:
		p.killed.Add(1)
	case err != nil && bytes.Contains(out, []byte("there is no previous build")): // its replay was killed
	case err != nil:
		p.failed.Add(1)
		complain("wharf %s: %v: %s", strings.Join(args, " "), err, out)
	case args[0] == "verify":
		p.verified.Add(1)
	case args[1] == "--rollback":
		p.rollbacks.Add(1)
	default:
		p.replays.Add(1)
	}
}

// do runs wharf to its end, or kills it with -9 when ctx ends, and returns all that it says.
func (p *replayer) do(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, p.run.wharf, args...)
	cmd.Env = append(os.Environ(), p.run.env...)
	cmd.SysProcAttr = attributes()
	return cmd.CombinedOutput()
}

// verify compares all read models with the log, in the end, when nobody is tortured.
func (p *replayer) verify(ctx context.Context) (rows, events int64, err error) {
	out, err := p.run.command(ctx, "verify", "--json")
	if err != nil {
		return 0, 0, fmt.Errorf("%w: %s", err, out)
	}
	var report struct {
		Items []struct{ Rows, Events int64 }
	}
	if err := json.Unmarshal(out, &report); err != nil || len(report.Items) != len(projections.All) {
		return 0, 0, fmt.Errorf("the verification said %q", out)
	}
	for _, item := range report.Items {
		rows += item.Rows
		events += item.Events
	}
	return rows, events, nil
}

// table is what it has to say in the end.
func (p *replayer) table(rows, events int64) string {
	var b strings.Builder
	row := func(name string, value any) { fmt.Fprintf(&b, "%-36s %12v\n", name, value) }
	row("replays", p.replays.Load())
	row("rollbacks", p.rollbacks.Load())
	row("verifications", p.verified.Load())
	row("  of all these, killed in the middle", p.killed.Load())
	row("  failed while servers were away", p.failed.Load())
	row("  differences found", p.differences.Load())
	row("rows verified in the end", rows)
	row("  of so many events", events)
	return b.String()
}
