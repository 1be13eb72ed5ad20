package cluster

import (
	"testing"
	"time"
)

// TestDrainOfMuteGates: nodes may send connections to gates that do not say how
// they are, so the origin behind these stays just as long.
func TestDrainOfMuteGates(t *testing.T) {
	t.Parallel()
	server, c := newFleetAPI(t)
	server.addGate("a", true).mute = true
	if _, err := c.ChangeGateState(t.Context(), "demo", addEntry("web", testEntry("culvert-gate", "s1", 20001))); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	err := c.drain(t.Context(), UndoSpec{Namespace: "demo", Key: "web", Say: func(string) {}}, "culvert-gate", true, false)
	if err == nil {
		t.Error("that a gate did not answer is not told")
	}
	if waited := time.Since(begun); waited < linger {
		t.Errorf("the origin would have been deleted %v after the switch", waited)
	}
}
