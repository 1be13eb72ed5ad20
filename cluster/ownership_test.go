package cluster

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	byApply  = metav1.ManagedFieldsOperationApply
	byUpdate = metav1.ManagedFieldsOperationUpdate

	selectorAndPort = `{"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{"f:targetPort":{}}},"f:selector":{}}}`
	onlySelector    = `{"f:spec":{"f:selector":{}}}`
	onlyPort        = `{"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{"f:targetPort":{}}}}}`
	allFields       = `{"f:metadata":{"f:labels":{"f:team":{}}},"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{".":{},"f:name":{},"f:port":{},"f:targetPort":{}}},"f:selector":{}}}`
	otherFields     = `{"f:metadata":{"f:labels":{"f:team":{}}},"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{".":{},"f:name":{},"f:port":{}}}}}`
	ourFields       = `{"f:metadata":{"f:annotations":{".":{},"f:culvert.dev/intercept":{}}},"f:spec":{"f:ports":{"k:{\"port\":80,\"protocol\":\"TCP\"}":{"f:targetPort":{}}},"f:selector":{}}}`
)

type entries = []metav1.ManagedFieldsEntry

func TestServiceOwners(t *testing.T) {
	for _, test := range []struct {
		name              string
		live, saved, want entries
	}{
		{"before the switch", entries{entry("argocd", byApply, allFields)}, nil, entries{entry("argocd", byApply, selectorAndPort)}},
		{"of other fields", entries{entry("argocd", byApply, otherFields)}, nil, nil},
		{"two share it", entries{entry("argocd", byApply, allFields), entry("canary", byApply, onlySelector)}, nil,
			entries{entry("argocd", byApply, selectorAndPort), entry("canary", byApply, onlySelector)}},
		{"switched", entries{entry("argocd", byApply, otherFields), entry("culvert", byUpdate, ourFields)}, entries{entry("argocd", byApply, selectorAndPort)},
			entries{entry("argocd", byApply, selectorAndPort)}},
		{"the selector taken meanwhile", entries{entry("argocd", byApply, otherFields), entry("culvert", byUpdate, onlyPort), entry("helm", byUpdate, onlySelector)},
			entries{entry("argocd", byApply, selectorAndPort)}, entries{entry("helm", byUpdate, onlySelector), entry("argocd", byApply, onlyPort)}},
		{"nothing is ours", entries{entry("argocd", byApply, otherFields)}, entries{entry("argocd", byApply, selectorAndPort)}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := owners(test.live, test.saved, isTouched)
			sameEntries(t, got, test.want, err)
		})
	}
}

func TestServiceGiveBack(t *testing.T) {
	early, late := metav1.NewTime(time.Unix(1000, 0)), metav1.NewTime(time.Unix(2000, 0))
	at := func(e metav1.ManagedFieldsEntry, when metav1.Time) metav1.ManagedFieldsEntry {
		e.Time = &when
		return e
	}
	status := entry("argocd", byApply, `{"f:status":{"f:loadBalancer":{}}}`)
	status.Subresource = "status"
	for _, test := range []struct {
		name              string
		live, saved, want entries
	}{
		{"beside what it owns", entries{at(entry("argocd", byApply, otherFields), late), entry("culvert", byUpdate, ourFields)}, entries{at(entry("argocd", byApply, selectorAndPort), early)},
			entries{at(entry("argocd", byApply, allFields), late)}},
		{"to one that owned no more", entries{entry("culvert", byUpdate, ourFields)}, entries{at(entry("kubectl", byUpdate, onlySelector), early)},
			entries{at(entry("kubectl", byUpdate, onlySelector), early)}},
		{"not what was taken meanwhile", entries{entry("culvert", byUpdate, onlyPort), entry("helm", byUpdate, onlySelector)}, entries{entry("argocd", byApply, selectorAndPort)},
			entries{entry("helm", byUpdate, onlySelector), entry("argocd", byApply, onlyPort)}},
		{"operation and subresource tell apart", entries{status, entry("argocd", byUpdate, otherFields), entry("culvert", byUpdate, ourFields)}, entries{entry("argocd", byApply, onlySelector)},
			entries{status, entry("argocd", byUpdate, otherFields), entry("argocd", byApply, onlySelector)}},
		{"nobody", entries{entry("culvert", byUpdate, ourFields)}, nil, entries{{}}},
		{"nobody at all", nil, nil, entries{{}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			before, _ := json.Marshal(test.live)
			got, err := giveBack(test.live, test.saved)
			sameEntries(t, got, test.want, err)
			if after, _ := json.Marshal(test.live); string(before) != string(after) {
				t.Error("the live entries were changed")
			}
		})
	}
	if _, err := giveBack(entries{entry("x", byUpdate, `{`), entry("culvert", byUpdate, `{"f:`)}, nil); err == nil {
		t.Error("fields that cannot be read are read")
	}
}

func sameEntries(t *testing.T, got, want entries, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	for v, es := range map[*any]entries{&a: got, &b: want} {
		text, _ := json.Marshal(es)
		if err := json.Unmarshal(text, v); err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("got  %v\nwant %v", a, b)
	}
}

func TestServiceChangedBy(t *testing.T) {
	at := func(e metav1.ManagedFieldsEntry, seconds int64) metav1.ManagedFieldsEntry {
		when := metav1.NewTime(time.Unix(seconds, 0))
		e.Time = &when
		return e
	}
	o := &metav1.ObjectMeta{ManagedFields: entries{
		at(entry("old", byUpdate, onlySelector), 1), at(entry("new", byUpdate, onlySelector), 3), at(entry("ports", byUpdate, onlyPort), 4), at(entry("culvert", byUpdate, ourFields), 5),
		at(entry("other", byUpdate, `{"f:spec":{"f:type":{}}}`), 6),
	}}
	if got := changedBy(o, isSelector); got != "new" {
		t.Errorf("the selector by %q", got)
	}
	if got := changedBy(o, isPort); got != "ports" {
		t.Errorf("the ports by %q", got)
	}
	if got := changedBy(&metav1.ObjectMeta{}, isPort); got != "" {
		t.Errorf("nobody is %q", got)
	}
}
