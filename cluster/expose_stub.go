package cluster

import corev1 "k8s.io/api/core/v1"

// Expose is one --expose, read.
type Expose struct {
	Local    uint16
	Remote   string // number or name; empty: not said
	Protocol corev1.Protocol
}
