"""Stands in for pydicom-seg, which MONAI Label imports on start and which cannot be imported beside pydicom 3.

It is empty: only the export of masks as DICOM SEG would ask anything of it.
"""
