package kafka

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/twmb/franz-go/pkg/kfake"

	"wharf/infra/journal"
)

func TestTopics(t *testing.T) {
	c := connect(t, brokers(t))
	specs := []TopicSpec{{topic(t, c, 3), 3, 1}, {topic(t, c, 3), 3, 1}}
	if err := c.CheckTopics(t.Context(), specs); err != nil {
		t.Fatalf("topics as created: %v", err)
	}
	if err := c.CreateTopics(t.Context(), specs); err != nil {
		t.Errorf("creating them again: %v", err)
	}
	a, err := sarama.NewClusterAdminFromClient(c.sarama)
	if err != nil {
		t.Fatal(err)
	}
	broken := specs[1].Name
	for _, tc := range []struct{ setting, value, wanted string }{
		{"retention.ms", "604800000", "-1"},
		{"retention.bytes", "1000000", "-1"},
		{"cleanup.policy", "compact", "delete"},
		{"cleanup.policy", "compact,delete", "delete"},
		{"unclean.leader.election.enable", "true", "false"},
		{"min.insync.replicas", "2", "1"},
		{"max.message.bytes", "1048576", "2228224"},
	} {
		t.Run(tc.setting, func(t *testing.T) {
			set := func(value string) {
				err := a.IncrementalAlterConfig(sarama.TopicResource, broken, map[string]sarama.IncrementalAlterConfigsEntry{
					tc.setting: {Operation: sarama.IncrementalAlterConfigsOperationSet, Value: &value},
				}, false)
				if err != nil {
					t.Fatal(err)
				}
			}
			set(tc.value)
			check := func(unsafe bool) error { // a broker tells of a change some time later
				for ctx := bounded(t); ; {
					if err := c.CheckTopics(t.Context(), specs); (err != nil) == unsafe || ctx.Err() != nil {
						return err
					}
				}
			}
			wantProblem(t, check(true), broken, tc.setting, tc.value, tc.wanted, "kafka-configs.sh")
			set(specs[1].config()[tc.setting])
			if err := check(false); err != nil {
				t.Errorf("after the repair: %v", err)
			}
		})
	}
	t.Run("several", func(t *testing.T) {
		err := c.CheckTopics(t.Context(), []TopicSpec{{specs[0].Name, 4, 2}, {broken, 3, 1}, {"no-such-topic", 3, 1}})
		wantProblem(t, err, specs[0].Name, "partition count", "3", "4")
		wantProblem(t, err, specs[0].Name, "replication factor", "1", "2")
		wantProblem(t, err, "no-such-topic", "does not exist")
		if strings.Contains(err.Error(), broken) {
			t.Errorf("%v\nnames a topic that is right", err)
		}
	})
}

func TestTopicsWithReplicas(t *testing.T) {
	onlyFake(t)
	c := connect(t, brokers(t, kfake.NumBrokers(3)))
	specs := []TopicSpec{{"replicated", 2, 3}}
	if err := c.CreateTopics(t.Context(), specs); err != nil {
		t.Fatal(err)
	}
	if err := c.CheckTopics(t.Context(), specs); err != nil {
		t.Fatal(err)
	}
	if found := specs[0].config()["min.insync.replicas"]; found != "2" {
		t.Errorf("min.insync.replicas is %s, want 2", found)
	}
	a, err := sarama.NewClusterAdminFromClient(c.sarama)
	if err != nil {
		t.Fatal(err)
	}
	one := "1"
	if err := a.IncrementalAlterConfig(sarama.TopicResource, "replicated", map[string]sarama.IncrementalAlterConfigsEntry{
		"min.insync.replicas": {Operation: sarama.IncrementalAlterConfigsOperationSet, Value: &one},
	}, false); err != nil {
		t.Fatal(err)
	}
	wantProblem(t, c.CheckTopics(t.Context(), specs), "replicated", "min.insync.replicas", "1", "at least 2")
}

// wantProblem wants a line of the error that has all the words.
func wantProblem(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one with %q", words)
		return
	}
lines:
	for _, line := range strings.Split(err.Error(), "\n") {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue lines
			}
		}
		return
	}
	t.Errorf("%v\nhas no line with %q", err, words)
}

// awaitPoll waits until the reader has asked for what comes from the offset on, or until it asks for nothing.
func awaitPoll(t *testing.T, r *Reader, from int64, asked bool) {
	t.Helper()
	polls := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, n := range r.nodes {
			for _, a := range n.asked[0] {
				return a.from == from
			}
		}
		return false
	}
	for ctx := bounded(t); polls() != asked; time.Sleep(time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatal("it never does")
		}
	}
}

// A topic that was deleted and made anew is found out, whether it is shorter by then than what was read of the old one
// or longer, and nothing of it is taken for the old one's.
func TestATopicMadeAnew(t *testing.T) {
	addrs := brokers(t)
	for name, records := range map[string]int{"empty": 0, "shorter": 5, "as long": 10, "longer": 20} {
		t.Run(name, func(t *testing.T) {
			c, other := connect(t, addrs), connect(t, addrs)
			specs := []TopicSpec{{topic(t, c, 1), 1, 1}}
			log := c.PublicLog(specs[0].Name)
			appendAll(t, log, 0, numbered(0, 0, 10))
			if err := c.CheckTopics(t.Context(), specs); err != nil {
				t.Fatal(err)
			}
			read, reading := make(chan struct{}), make(chan error)
			go func() {
				next := int64(0)
				reading <- log.Read(bounded(t), 0, 0, func(b journal.Batch) error {
					if next = b.Next; next == 10 {
						close(read)
					} else if next > 10 {
						t.Errorf("it reads on to %d", next)
					}
					return nil
				})
			}()
			<-read
			reader := c.Reader(specs[0].Name)
			awaitPoll(t, reader, 10, true)
			makeAnew(t, other, specs[0], func() { awaitPoll(t, reader, 10, false) }) // it gets an error
			if records > 0 {
				appendAll(t, other.PublicLog(specs[0].Name), 0, numbered(0, 0, records))
			}

			wantProblem(t, <-reading, specs[0].Name, "made anew", "restore it")
			wantProblem(t, c.CheckTopics(t.Context(), specs), specs[0].Name, "made anew", "restore it")
			wantProblem(t, log.Read(bounded(t), 0, 0, func(journal.Batch) error { return errEnough }), "made anew")
			wantProblem(t, log.AppendBatch(t.Context(), 0, numbered(0, 10, 1)), "made anew")
			if end, err := other.Reader(specs[0].Name).End(t.Context(), 0); err != nil || end != int64(records) {
				t.Errorf("the new topic ends at %d, %v, want %d", end, err, records)
			}
			if err := connect(t, addrs).CheckTopics(t.Context(), specs); err != nil {
				t.Errorf("whoever starts now knows no other: %v", err)
			}
		})
	}
}

// A topic that was made anew between two requests of a reader is noticed a second later, though no request fails.
func TestATopicMadeAnewBetweenTwoRequests(t *testing.T) {
	c := connect(t, brokers(t))
	spec := TopicSpec{topic(t, c, 1), 1, 1}
	appendAll(t, c.PublicLog(spec.Name), 0, numbered(0, 0, 1))
	reads, reading := make(chan struct{}), make(chan error)
	go func() {
		reading <- c.Reader(spec.Name).Read(bounded(t), 0, 0, func(journal.Batch) error { close(reads); return nil })
	}()
	<-reads
	c.mu.Lock()
	c.known[spec.Name] = identity{id: sarama.Uuid{1}} // as if it had been another
	c.mu.Unlock()
	wantProblem(t, <-reading, spec.Name, "made anew", "restore it")
}

// A publisher that has had nothing to do for a while finds out before it appends.
func TestAppendToATopicMadeAnew(t *testing.T) {
	addrs := brokers(t)
	c, other := connect(t, addrs), connect(t, addrs)
	spec := TopicSpec{topic(t, c, 1), 1, 1}
	log := c.PublicLog(spec.Name)
	appendAll(t, log, 0, numbered(0, 0, 10))
	makeAnew(t, other, spec, func() {})
	c.mu.Lock()
	known := c.known[spec.Name]
	known.seen = known.seen.Add(-staleIdentity)
	c.known[spec.Name] = known
	c.mu.Unlock()
	wantProblem(t, log.AppendBatch(t.Context(), 0, numbered(0, 10, 1)), spec.Name, "made anew")
	if end, err := other.Reader(spec.Name).End(t.Context(), 0); err != nil || end != 0 {
		t.Errorf("the new topic ends at %d, %v, want 0", end, err)
	}
}

func makeAnew(t *testing.T, c *Client, spec TopicSpec, deleted func()) {
	a, err := sarama.NewClusterAdminFromClient(c.sarama)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.DeleteTopic(spec.Name); err != nil {
		t.Fatal(err)
	}
	deleted()
	for ctx := bounded(t); ; { // the name is free some time later
		err := a.CreateTopic(spec.Name, &sarama.TopicDetail{
			NumPartitions: spec.Partitions, ReplicationFactor: spec.Replication, ConfigEntries: entries(spec),
		}, false)
		if err == nil {
			break
		}
		if !errors.Is(err, sarama.ErrTopicAlreadyExists) || ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Reader(spec.Name).End(bounded(t), 0); err != nil {
		t.Fatal(err)
	}
}

func entries(spec TopicSpec) map[string]*string {
	all := map[string]*string{}
	for setting, value := range spec.config() {
		all[setting] = &value
	}
	return all
}
