package kafka

import (
	"strings"
	"testing"

	"github.com/IBM/sarama"
	"github.com/twmb/franz-go/pkg/kfake"
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
			wantProblem(t, c.CheckTopics(t.Context(), specs), broken, tc.setting, tc.value, tc.wanted, "kafka-configs.sh")
			set(specs[1].config()[tc.setting])
			if err := c.CheckTopics(t.Context(), specs); err != nil {
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
