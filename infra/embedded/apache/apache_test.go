package apache_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"wharf/infra/embedded/apache"
	"wharf/infra/journal"
	"wharf/infra/kafka"
)

// needed skips a test of real brokers where they are not asked for.
func needed(t *testing.T) context.Context {
	if os.Getenv("WHARF_TEST_APACHE") != "1" {
		t.Skip("`make test-kafka` runs it: it needs Java and Maven")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func start(t *testing.T, ctx context.Context, brokers int) *apache.Cluster {
	c, err := apache.Start(ctx, t.TempDir(), brokers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

func TestWhatWasAcknowledgedOutlivesAKill(t *testing.T) {
	ctx := needed(t)
	cluster := start(t, ctx, 1)
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: cluster.Addrs()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.CreateTopics(ctx, []kafka.TopicSpec{{Name: "outlives", Partitions: 1, Replication: 1}}); err != nil {
		t.Fatal(err)
	}
	log := client.Log("outlives")
	broker := cluster.Brokers()[0]
	addr := broker.Addr
	const n = 10
	for i := range n {
		if err := log.Append(ctx, journal.Record{Key: []byte("k"), Value: fmt.Append(nil, i)}); err != nil {
			t.Fatal(err)
		}
		switch i {
		case 3:
			broker.Kill()
			if err := broker.Start(ctx); err != nil {
				t.Fatal(err)
			}
		case 5:
			broker.Pause()
			time.AfterFunc(100*time.Millisecond, broker.Resume)
		case 7:
			broker.Stop()
			if err := broker.Start(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if broker.Addr != addr {
		t.Errorf("the broker has moved from %s to %s", addr, broker.Addr)
	}
	done := errors.New("done")
	read := 0
	err = log.Read(ctx, 0, 0, func(b journal.Batch) error {
		for _, r := range b.Records {
			if want := fmt.Sprint(read); string(r.Value) != want {
				return fmt.Errorf("record %d is %s, want %s", r.Offset, r.Value, want)
			}
			read++
		}
		if read == n {
			return done
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Error(err)
	}
}

func TestMissingJavaIsNamed(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := apache.Start(t.Context(), t.TempDir(), 1)
	if !errors.Is(err, apache.ErrMissing) || !strings.Contains(err.Error(), "install Java 17") {
		t.Errorf("the error is: %v", err)
	}
}
